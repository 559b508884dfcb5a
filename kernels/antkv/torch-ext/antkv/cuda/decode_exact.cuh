// Attention of a few queries over exact tokens: anchors, sinks and the window, 16 of them a tile and warp. As over codes
// a lane owns a quarter of a token's channels for the logits and an eighth of them for the output.

// What every lane keeps of the online softmax over exact tokens, for the query rows of its two columns.
template <class S>
struct ExactSums {
  float maximum[2], total[2], out[S::D / 16][4];
};

enum Kind { INT8, PLAIN };  // PLAIN: float16 or bfloat16, which is taken as float16

// The plain query in the order of `Pairs`, as [8 channels of a lane][query row][lane] of float16; after it the query
// for keys before RoPE, times the scale of pairs.
template <class S>
DEVICE void store_query(const Arguments& a, int b, int h, bool neighbours, const Team<S>& team) {
  const int rows = a.group * a.q_len;
  for (int i = team.thread; i < S::ROWS * S::D / 4; i += S::TEAM_THREADS) {
    const int row = i / (S::D / 4), eight = i % (S::D / 4) / 2, two = i % 2;
    float x[2] = {}, y[2] = {}, scale[2] = {};
    if (row < rows) {
      const uint16_t* q = query_of_row(a, b, h, row);
      for (int k = 0; k < 2; k++) {
        const int at = eight * 4 + two * 2 + k;
        const uint32_t channels =
            neighbours ? at | (at + S::D / 2) << 8 : load_shared_16(team.base + Pairs<S>::CHANNELS + 2 * at);
        x[k] = load_16(q + (channels & 255u), a.query_is_bfloat) * a.scale_log2;
        y[k] = load_16(q + (channels >> 8), a.query_is_bfloat) * a.scale_log2;
        scale[k] = S::ROTATES ? load_shared_float(team.base + Pairs<S>::SCALE + 4 * at) : 1.0f;
      }
    }
    const uint32_t place =
        team.work + (eight % (S::D / 32) * S::ROWS + row) * 64 + eight / (S::D / 32) * 16 + two * 8;
    store_shared_64(place, pack_half2(x[0], x[1]), pack_half2(y[0], y[1]));
    store_shared_64(place + S::QUERY_BYTES, pack_half2(x[0] * scale[0], x[1] * scale[1]),
                    pack_half2(y[0] * scale[0], y[1] * scale[1]));
  }
}

// Bytes 2 i and 2 i + 1 of a word of signed bytes whose signs were turned over, as two float16.
DEVICE uint32_t bytes_to_half2(uint32_t w, int i) {
  return add_half2(permute_bytes(w, 0x64646464u, i ? 0x4342 : 0x4140), 0xe480e480u);  // 1024 + 128 + x, less 1152
}
DEVICE uint32_t to_half2(uint32_t bfloats) {
  return pack_half2(bfloat_to_float((uint16_t)bfloats), bfloat_to_float((uint16_t)(bfloats >> 16)));
}

// Neighbouring elements as they are stored, and pair `k` of them as float16. COUNT: 8 or 16.
template <Kind KIND, int COUNT>
struct Row {
  static constexpr int WORDS = COUNT / (KIND == INT8 ? 4 : 2), PIECE = WORDS < 4 ? WORDS : 4;
  uint32_t words[WORDS / PIECE][PIECE];

  // From element `i` on, a multiple of COUNT.
  DEVICE void load(const void* p, int64_t i) {
#pragma unroll
    for (int k = 0; k < WORDS / PIECE; k++)
      load_piece((const uint16_t*)((const uint8_t*)p + i * (KIND == INT8 ? 1 : 2)) + 8 * k, words[k]);
  }
  DEVICE uint32_t pair(int k, int is_bfloat) const {
    if (KIND == INT8) return bytes_to_half2(words[k / 2 / PIECE][k / 2 % PIECE] ^ 0x80808080u, k % 2);
    const uint32_t word = words[k / PIECE][k % PIECE];
    return is_bfloat ? to_half2(word) : word;
  }
};

template <Kind KIND>
DEVICE uint32_t load_two(const void* p, int64_t first, int64_t second, int is_bfloat) {
  if (KIND == INT8) return pack_half2((float)((const int8_t*)p)[first], (float)((const int8_t*)p)[second]);
  const uint32_t both = ((const uint16_t*)p)[first] | (uint32_t)((const uint16_t*)p)[second] << 16;
  return is_bfloat ? to_half2(both) : both;
}

// A lane's quarter of the keys that begin at elements `row`: pairs (x, x), (y, y) in turn.
template <class S, Kind KIND>
DEVICE void load_keys(const void* keys, const int64_t (&row)[2], int is_bfloat, int c, bool neighbours, uint32_t base,
                      uint32_t (&key)[2][S::D / 8]) {
  if (neighbours) {
    Row<KIND, S::D / 8> half[2][2];
    for (int t = 0; t < 2; t++)
      for (int k = 0; k < 2; k++) half[t][k].load(keys, row[t] * S::D + k * (S::D / 2) + c * (S::D / 8));
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
      for (int i = 0; i < S::D / 8; i++) key[t][i] = half[t][i % 2].pair(i / 2, is_bfloat);
  } else {
#pragma unroll
    for (int i = 0; i < S::D / 8; i += 2) {
      const uint32_t pairs = load_shared_32(base + Pairs<S>::CHANNELS + 2 * (c * (S::D / 8) + i));
#pragma unroll
      for (int t = 0; t < 2; t++)
        for (int k = 0; k < 2; k++)
          key[t][i + k] = load_two<KIND>(keys, row[t] * S::D + (pairs >> 8 * k & 255u),
                                         row[t] * S::D + (pairs >> (16 + 8 * k) & 255u), is_bfloat);
    }
  }
}

// Adds the tokens first..last-1 of a set. Without positions they are consecutive from `first_position` on. Tiles begin
// with warp `first_warp`, so that a few of several sets go to several warps.
// INT8 keys are before RoPE, less their mean; others after it. Logits of the tail, the set without positions, go to
// `tail_logits` if that is given: who scores the tail needs them when the sum of weights is known.
template <class S, Kind KIND>
DEVICE void attend_exact(const Arguments& a, int b, int h, int first, int last, int rows_in_buffer,
                         const int* positions, const void* keys, const void* values, const uint16_t* key_scale,
                         const uint16_t* value_scale, int first_position, int length, int first_warp, bool neighbours,
                         const Team<S>& team, ExactSums<S>& sums) {
  constexpr int WARPS = S::TEAM_WARPS, CHANNELS = S::D / 8, BYTES = S::D * (KIND == INT8 ? 1 : 2);
  const uint32_t base = team.base, query_place = team.work + (KIND == INT8 ? S::QUERY_BYTES : 0);
  const int lane = team.lane(), g = lane / 4, c = lane % 4;
  const int offset = (int)a.offset[b], lowest = a.hides_padding ? offset : 0;
  const int64_t start = ((int64_t)b * a.heads + h) * rows_in_buffer;
  int last_seen[2];
  for (int k = 0; k < 2; k++) last_seen[k] = a.causal ? length - a.q_len + (2 * c + k) % a.q_len : length - 1;
  for (int tile = first + (team.warp() + WARPS - first_warp) % WARPS * 16; tile < last; tile += 16 * WARPS) {
    const int ahead = tile + 16 * WARPS + lane % 16;  // rows are far away
    if (ahead < last) ask_for((const uint8_t*)(lane < 16 ? keys : values) + (start + ahead) * BYTES);
    // All loads of a tile before what needs one.
    int position[2];
    int64_t row[2];
    uint32_t key[2][CHANNELS];
    uint16_t scale[2], value_scale_of[2];
    Row<KIND, CHANNELS> value[4];
#pragma unroll
    for (int t = 0; t < 2; t++) {
      row[t] = start + smaller(tile + g + 8 * t, last - 1);
      position[t] = positions ? positions[row[t]] : first_position + tile + g + 8 * t;
      if (KIND == INT8) scale[t] = key_scale[row[t]], value_scale_of[t] = value_scale[row[t]];
    }
#pragma unroll
    for (int t = 0; t < 4; t++)
      value[t].load(values, (start + smaller(tile + 2 * c + t % 2 + t / 2 * 8, last - 1)) * S::D + g * CHANNELS);
    load_keys<S, KIND>(keys, row, a.is_bfloat, c, neighbours, base, key);
#pragma unroll
    for (int t = 0; t < 2; t++)  // what is not seen is later than anything that is
      if (tile + g + 8 * t >= last || position[t] < lowest) position[t] = 0x7fffffff;
    if (KIND == INT8)
#pragma unroll
      for (int t = 0; t < 2; t++) {
        const uint32_t both = (uint32_t)scale[t] * 0x10001u;
        const float turned = (float)(position[t] - offset);
#pragma unroll
        for (int i = 0; i < CHANNELS; i += 4) {
          uint32_t mean[4], frequency[4];
          load_shared_128(base + Pairs<S>::MEAN + c * (4 * CHANNELS) + 4 * i, mean);
          for (int k = 0; k < 4; k++) key[t][i + k] = multiply_add_half2(key[t][i + k], both, mean[k]);
          if (S::ROTATES) {
            load_shared_128(base + Pairs<S>::FREQUENCY + c * (4 * CHANNELS) + 4 * i, frequency);
            float sine[4], cosine[4];
#pragma unroll
            for (int k = 0; k < 4; k++) sin_cos(turned * as_float(frequency[k]), sine[k], cosine[k]);
            for (int k = 0; k < 4; k += 2)
              turn(key[t][i + k], key[t][i + k + 1], pack_half2(cosine[k], cosine[k + 1]),
                   pack_half2(sine[k], sine[k + 1]));
          }
        }
      }
    float part[2][4] = {}, logits[4], peak[2];
#pragma unroll
    for (int i = 0; i < CHANNELS; i += 4) {
      uint32_t query[4];
      load_shared_128(query_place + (i / 4 * S::ROWS + g % S::ROWS) * 64 + c * 16, query);
      multiply_add(part[0], key[0][i], key[1][i], key[0][i + 1], key[1][i + 1], query[0], query[1]);
      multiply_add(part[1], key[0][i + 2], key[1][i + 2], key[0][i + 3], key[1][i + 3], query[2], query[3]);
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
      logits[k] = part[0][k] + part[1][k];
      if (S::SOFTCAP) logits[k] = a.softcap_log2 * tanh_of(logits[k] / a.softcap_log2);
      if (position[k / 2] > last_seen[k % 2]) logits[k] = minus_infinity();
    }
    if (KIND == PLAIN && !positions && a.tail_logits && 2 * c < S::ROWS)
      for (int t = 0; t < 2; t++)
        if (tile + g + 8 * t < last)
          store_64(a.tail_logits + (((uint32_t)start + tile + g + 8 * t) * S::ROWS + 2 * c), logits[2 * t],
                   logits[2 * t + 1]);
    for (int k = 0; k < 2; k++) peak[k] = largest(logits[k], logits[2 + k]);
    raise_maximum<4>(peak, sums.maximum, sums.total, sums.out);
    uint32_t prob[2];
#pragma unroll
    for (int t = 0; t < 2; t++) {
      float p[2];
      for (int k = 0; k < 2; k++) {
        p[k] = exp2_fast(logits[2 * t + k] - sums.maximum[k]);
        sums.total[k] += p[k];
      }
      const float size = KIND == INT8 ? half_to_float(value_scale_of[t]) : 1.0f;
      prob[t] = transpose_matrix(pack_half2(p[0] * size, p[1] * size));
    }
#pragma unroll
    for (int i = 0; i < CHANNELS / 2; i++) {
      uint32_t pair[4];
#pragma unroll
      for (int t = 0; t < 4; t++) pair[t] = value[t].pair(i, a.is_bfloat);
      multiply_add(sums.out[i], permute_bytes(pair[0], pair[1], 0x5410), permute_bytes(pair[0], pair[1], 0x7632),
                   permute_bytes(pair[2], pair[3], 0x5410), permute_bytes(pair[2], pair[3], 0x7632), prob[0], prob[1]);
    }
  }
}
