// Packed codes: what a lane reads of a token's rows, and in what order it needs them. A row has a byte for each stage
// of each group of channels, stages of a group next to each other.

// Codes of a tile of 16 tokens as a lane reads them: keys of tokens g and g + 8, values of 2c, 2c + 1, 2c + 8, 2c + 9.
// A bit of `hidden` says that a token does not count: with up to four query rows a lane looks at one of them.
template <class S>
struct TileCodes {
  uint32_t key[2][S::Key::LOADED], value[4][S::Value::LOADED], hidden[S::GROUPS];
};

// The window of codes that begin at byte `first` of a row.
template <class C>
DEVICE int window_of(int first) {
  return C::STAGES == 3 ? smaller(first & -C::UNIT, C::WIDTH - 2 * C::UNIT) : first;
}

// Which bytes of a window are the three codes of a group that begins at its byte `first`; `swapped`: the second first.
template <class C>
DEVICE uint32_t three_codes(int first, bool swapped) {
  uint32_t selector = 0;
  for (int stage = 0; stage < 3; stage++) {
    const int byte = first + (stage < 2 && swapped ? 1 - stage : stage);
    selector |= (uint32_t)(C::UNIT == 4 ? byte : byte / 2 * 4 + byte % 2) << (4 * stage);
  }
  return selector;
}

// Where in a row of codes a lane's begin. With three stages each of its windows has codes of two groups, in the order
// of its steps.
template <class S>
DEVICE int key_byte(int g, int c, int window) {
  const int first = c * S::KEY_GROUPS / 4 * S::KEY_STAGES;
  return S::KEY_STAGES == 3 ? first + 6 * (window ^ g % S::KEY_WAYS / S::KEY_SPREAD / 2) : first;
}
template <class S>
DEVICE int value_byte(int g) {
  return g * S::VALUE_PER_LANE / S::VALUE_SPREAD * S::VALUE_STAGES;
}

template <class S>
DEVICE void load_key(const uint8_t* key, int to_second, uint32_t (&codes)[S::Key::LOADED]) {
  if constexpr (S::KEY_STAGES < 3) load_once<S::Key::BYTES>(key, codes);
  else
#pragma unroll
    for (int i = 0; i < S::Key::LOADED; i++)
      load_once<S::Key::UNIT>(key + i / 2 * to_second + i % 2 * S::Key::UNIT, codes + i);
}
template <class S>
DEVICE void load_value(const uint8_t* value, uint32_t (&codes)[S::Value::LOADED]) {
  if constexpr (S::VALUE_STAGES < 3) load_kept<S::Value::BYTES>(value, codes);
  else
#pragma unroll
    for (int i = 0; i < S::Value::LOADED; i++) load_kept<S::Value::UNIT>(value + i * S::Value::UNIT, codes + i);
}

// The codes of the next tiles of a warp, a span apart, on their way; with up to four query rows `second` says which
// token's bit a lane looks at.
template <class S>
struct NextTiles {
  TileCodes<S> tile[S::TILES];
  const uint8_t *key, *value, *bits;  // where the lane's codes of the tiles to load begin
  int to_second;                      // from a key's first window to its second

  DEVICE NextTiles(const Arguments& a, int64_t bh, int from, int g, int c, bool second) : tile{} {
    const int window = window_of<typename S::Key>(key_byte<S>(g, c, 0));
    to_second = window_of<typename S::Key>(key_byte<S>(g, c, 1)) - window;
    key = a.key_codes + (bh * a.capacity + from + g) * S::Key::WIDTH + window;
    const int first = window_of<typename S::Value>(value_byte<S>(g));
    value = a.value_codes + (bh * a.capacity + from + 2 * c) * S::Value::WIDTH + first;
    bits = a.exact_bits + bh * a.bits_width + from / 8 + second;
  }

  // Goes on to the tiles after these. From the first one's beginning on `room` tokens exist in the buffers, none or
  // less if it is beyond them: what does not exist is read from the last that does, and hidden.
  DEVICE void load(int room, int g, int c, bool second) {
    if (room >= (S::TILES - 1) * S::SPAN + 16) {
#pragma unroll
      for (int i = 0; i < S::TILES; i++) {
#pragma unroll
        for (int k = 0; k < 2; k++)
          load_key<S>(key + (i * S::SPAN + 8 * k) * S::Key::WIDTH, to_second, tile[i].key[k]);
#pragma unroll
        for (int k = 0; k < S::GROUPS; k++) load_once<1>(bits + i * (S::SPAN / 8) + k, &tile[i].hidden[k]);
#pragma unroll
        for (int k = 0; k < 4; k++)
          load_value<S>(value + (i * S::SPAN + k % 2 + k / 2 * 8) * S::Value::WIDTH, tile[i].value[k]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < S::TILES; i++) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const int token = smaller(i * S::SPAN + g + 8 * k, room - 1);
          load_key<S>(key + (token - g) * S::Key::WIDTH, to_second, tile[i].key[k]);
        }
#pragma unroll
        for (int k = 0; k < S::GROUPS; k++) {
          const int byte = i * (S::SPAN / 8) + second + k;
          load_once<1>(bits + smaller(byte, (room - 1) >> 3) - second, &tile[i].hidden[k]);
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const int token = smaller(i * S::SPAN + 2 * c + k % 2 + k / 2 * 8, room - 1);
          load_value<S>(value + (token - 2 * c) * S::Value::WIDTH, tile[i].value[k]);
        }
      }
    }
    key += S::TILES * S::SPAN * S::Key::WIDTH;
    value += S::TILES * S::SPAN * S::Value::WIDTH;
    bits += S::TILES * S::SPAN / 8;
  }
};

// The codes of a token's key in the order of the lane's steps, see decode_codes.cuh: in step w it reads entry w ^ g.
template <class S>
DEVICE void order_key(const uint32_t (&loaded)[S::Key::LOADED], int g, int c, uint32_t (&key)[S::KEY_WORDS]) {
  constexpr int COUNT = S::KEY_WAYS / S::KEY_SPREAD, PER_WORD = 4 / S::KEY_STAGES;  // codes of a section, of a word
  const int mask = g % S::KEY_WAYS / S::KEY_SPREAD;
  if constexpr (S::KEY_STAGES == 3) {
#pragma unroll
    for (int i = 0; i < S::KEY_WORDS; i++) {
      const int first = key_byte<S>(g, c, i / 2), in_window = first - window_of<typename S::Key>(first);
      const uint32_t selector = three_codes<typename S::Key>(in_window + 3 * ((i ^ mask) & 1), false);
      key[i] = permute_bytes(loaded[i / 2 * 2], loaded[i / 2 * 2 + 1], selector);
    }
  } else {
    const uint32_t selector = 0x3210u ^ ((uint32_t)(mask & (PER_WORD - 1)) * (S::KEY_STAGES * 0x1111u));
#pragma unroll
    for (int i = 0; i < S::KEY_WORDS; i++) {
      const uint32_t word = COUNT > PER_WORD && (mask & PER_WORD) ? loaded[i ^ 1] : loaded[i];
      key[i] = COUNT <= 1 ? word : permute_bytes(word, word, selector);
    }
  }
}

// The codes of four tokens' values in the order of the lane's steps: entries of a pair, and the first two stages, which
// stand in each other's columns. Two tokens share a word if they fit.
template <class S>
DEVICE void order_values(const uint32_t (&loaded)[4][S::Value::LOADED], int g, int c,
                         uint32_t (&value)[S::VALUE_WORDS]) {
  const bool other_entry = S::VALUE_SPREAD == 1 && (c & 1), other_stage = S::VALUE_STAGES > 1 && c / 2;
  // What changes of a byte's place in a word.
  const uint32_t flip = (other_entry ? S::VALUE_STAGES * 0x1111u : 0u) ^ (other_stage ? 0x1111u : 0u);
  if constexpr (S::VALUE_STAGES == 3) {
    const int first = value_byte<S>(g), in_window = first - window_of<typename S::Value>(first);
#pragma unroll
    for (int i = 0; i < S::VALUE_WORDS; i++) {
      constexpr int CODES = S::Value::CODES;
      const int code = CODES == 1 ? 0 : i % CODES ^ (int)other_entry;
      const uint32_t selector = three_codes<typename S::Value>(in_window + 3 * code, other_stage);
      value[i] = permute_bytes(loaded[i / CODES][0], loaded[i / CODES][1], selector);
    }
  } else if constexpr (S::VALUE_BYTES == 2) {
    for (int i = 0; i < 2; i++) value[i] = permute_bytes(loaded[2 * i][0], loaded[2 * i + 1][0], 0x5410u ^ flip);
  } else {
    constexpr int WORDS = S::Value::LOADED;
#pragma unroll
    for (int i = 0; i < S::VALUE_WORDS; i++) {
      const uint32_t word = loaded[i / WORDS][i % WORDS];
      value[i] = S::VALUE_SPREAD == 1 ? permute_bytes(word, word, 0x3210u ^ flip) : word;
    }
  }
}
