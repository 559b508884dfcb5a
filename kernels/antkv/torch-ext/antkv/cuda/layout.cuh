// What the kernel takes, what it is compiled for, and where a block keeps its tables.

struct Arguments {
  const uint16_t* query;  // float16 or bfloat16, strides in elements
  int64_t query_stride_b, query_stride_h, query_stride_n;
  float* partial;  // (batch, kv_heads, 2 * splits, rows, value_dim), codes first
  float* partial_max;
  float* partial_total;
  const uint8_t* key_codes;  // (batch, kv_heads, capacity, width)
  const uint8_t* value_codes;
  const uint8_t* exact_bits;  // (batch, kv_heads, bits_width)
  const int64_t* offset;      // (batch,)
  const int* lengths;         // coded tokens, tail tokens, anchors; null: as below
  const uint16_t* key_centroids;  // (kv_heads, groups, codes, sub_dim), float16
  const uint16_t* value_centroids;
  const int* channels;      // (kv_heads, head_dim): plain channel of a latent one
  const float* frequency;   // (kv_heads, head_dim / 2)
  const float* pair_scale;  // (kv_heads, head_dim / 2)
  const float* mean;        // (kv_heads, head_dim), latent order
  // "Anchors" are the larger set of exact tokens, "sinks" the smaller, plain one: see sort_exact in decode_plan.py.
  const int* anchor_positions;  // (batch, kv_heads, anchor_capacity)
  const void* anchor_keys;
  const void* anchor_values;
  const uint16_t* anchor_key_scale;
  const uint16_t* anchor_value_scale;
  const int* sink_positions;
  const void* sink_keys;
  const void* sink_values;
  const void* tail_keys;
  const void* tail_values;
  int batch, heads, group, q_len, splits, blocks_per_head;
  int coded, tail, anchors, sinks, capacity, tail_capacity, anchor_capacity, bits_width;
  // is_bfloat: tail and plain sets; anchor_kind: 0 none, 1 int8, 2 plain
  int query_is_bfloat, is_bfloat, anchor_kind, hides_padding, causal;
  float scale_log2;  // of q.k, times log2(e)
  float softcap_log2;  // 0: none
};

constexpr float LOWEST = -1e30f;
constexpr int SECTION = 32768;
constexpr int SPANS_AHEAD = 16;  // spans whose queries are turned at a time

DEVICE float load_16(const uint16_t* p, int is_bfloat) { return is_bfloat ? bfloat_to_float(*p) : half_to_float(*p); }

// The query of a row of a kv head: rows are (query head of the group, query token).
DEVICE const uint16_t* query_of_row(const Arguments& a, int b, int h, int row) {
  return a.query + b * a.query_stride_b + (int64_t)(h * a.group + row / a.q_len) * a.query_stride_h +
         (row % a.q_len) * a.query_stride_n;
}

// Sine and cosine of a position's angle: whole turns are taken off first. To 1e-5 up to a million radians.
DEVICE void sin_cos(float angle, float& sine, float& cosine) {
  float turns = round_to_even(angle * 0.15915494309189535f);
  float rest = fused_multiply_add(turns, -6.28125f, angle);
  rest = fused_multiply_add(turns, -1.9353071795864769e-3f, rest);
  sine = sin_fast(rest);
  cosine = cos_fast(rest);
}

// KEY_DIM, VALUE_DIM: channels that a code stands for. An entry is what one read of a table brings: a code's channels,
// eight at most.
template <int HEAD_DIM, int ROW_GROUPS, int KEY_DIM_, int VALUE_DIM_, int WARPS, bool ROTATES_, bool SOFTCAP_>
struct Shape {
  static constexpr bool ROTATES = ROTATES_, SOFTCAP = SOFTCAP_;
  static constexpr int D = HEAD_DIM, GROUPS = ROW_GROUPS, ROWS = 4 * ROW_GROUPS;
  static constexpr int KEY_DIM = KEY_DIM_, VALUE_DIM = VALUE_DIM_;
  static constexpr int THREADS = 32 * WARPS, SPAN = 16 * WARPS, AHEAD = SPANS_AHEAD / ROW_GROUPS;
  static constexpr int KEY_WIDTH = D / KEY_DIM, VALUE_WIDTH = D / VALUE_DIM;  // bytes of a token's codes
  static constexpr int KEY_ENTRY = KEY_DIM < 8 ? KEY_DIM : 8, VALUE_ENTRY = VALUE_DIM < D / 16 ? VALUE_DIM : D / 16;
  static constexpr int KEY_SPREAD = KEY_DIM / KEY_ENTRY, VALUE_SPREAD = VALUE_DIM / VALUE_ENTRY;  // entries of a code
  // A section is 256 rows of 128 bytes, one a code. Keys: `KEY_WAYS` entries of each of a token's four lanes.
  static constexpr int KEY_WAYS = 16 / KEY_ENTRY, KEY_SECTIONS = D / 64;
  // Values: two entries of each of `VALUE_WAYS` lanes, twice.
  static constexpr int VALUE_WAYS = 16 / VALUE_ENTRY, VALUE_SECTIONS = D / 32;
  static constexpr int VALUE_PER_LANE = D / VALUE_ENTRY / 8, VALUE_STEPS = VALUE_PER_LANE / 2;
  static constexpr int KEY_BYTES = KEY_WIDTH / 4;  // of a token's codes that a lane reads
  static constexpr int KEY_WORDS = KEY_BYTES < 4 ? 1 : KEY_BYTES / 4;
  static constexpr int VALUE_BYTES = VALUE_PER_LANE < VALUE_SPREAD ? 1 : VALUE_PER_LANE / VALUE_SPREAD;
  static constexpr int VALUE_WORDS = VALUE_BYTES <= 2 ? 2 : VALUE_BYTES;  // of four tokens' codes
  static constexpr int QUERY_BYTES = D * ROWS * 2;  // one turned query
  static constexpr int KEY_TABLE = 0, VALUE_TABLE = KEY_SECTIONS * SECTION;
  static constexpr int PAIRS = VALUE_TABLE + VALUE_SECTIONS * SECTION;
  static constexpr int STATES = PAIRS + 7 * D, SUMS = STATES + 2 * WARPS * ROWS * 4;
  static constexpr int QUERIES = STATES;  // warps' sums take the place of queries
  static constexpr int END_OF_LOOP = QUERIES + 2 * AHEAD * QUERY_BYTES, END_OF_SUMS = SUMS + WARPS * ROWS * D * 4;
  static constexpr int BYTES = END_OF_LOOP > END_OF_SUMS ? END_OF_LOOP : END_OF_SUMS;
};

// What one load of a table brings: codes that follow one another if an entry is a whole code, else one entry.
template <int ENTRY, int SPREAD>
struct Piece {
  static constexpr int CODES = SPREAD == 1 ? 8 / ENTRY : 1, WORDS = ENTRY * CODES / 2;
};

template <int WORDS>
DEVICE void load_piece(const uint16_t* p, uint32_t (&r)[WORDS]) {
  if constexpr (WORDS == 4) load_128(p, r);
  else load_64(p, r);
}

// (x, y) (x, y) -> (x, x) (y, y), so that two pairs turn at a time.
DEVICE void gather_pairs(uint32_t& first, uint32_t& second) {
  const uint32_t x = permute_bytes(first, second, 0x5410);
  second = permute_bytes(first, second, 0x7632);
  first = x;
}

// The entries of a piece, `WORDS` words each, to the same column of rows that follow one another.
template <int WORDS, int COUNT>
DEVICE void store_entries(uint32_t to, uint32_t (&piece)[COUNT]) {
#pragma unroll
  for (int k = 0; k < COUNT; k += WORDS) {
    const uint32_t place = to + k / WORDS * 128;
    if constexpr (WORDS == 4) store_shared_128(place, piece);
    if constexpr (WORDS == 2) store_shared_64(place, piece[k], piece[k + 1]);
    if constexpr (WORDS == 1) store_shared_32(place, piece[k]);
  }
}

// RoPE pairs in the order in which lanes own them, in shared memory: that of their first channels if every pair is
// (i, i + D/2), so that a lane's channels are neighbours, else the latent one.
template <class S>
struct Pairs {
  static constexpr int FREQUENCY = S::PAIRS, SCALE = FREQUENCY + 2 * S::D, MEAN = SCALE + 2 * S::D;
  static constexpr int CHANNELS = MEAN + 2 * S::D;
};

// Returns whether a lane's channels are neighbours.
template <class S>
DEVICE bool sort_pairs(const Arguments& a, int h, uint32_t base, int thread) {
  constexpr int HALF_D = S::D / 2;
  const bool mine = thread < HALF_D;
  int channel[2] = {0, HALF_D};
  if (mine)
    for (int k = 0; k < 2; k++) channel[k] = a.channels[h * S::D + 2 * thread + k];
  const bool neighbours = !S::ROTATES || all_of_block(channel[1] == channel[0] + HALF_D);
  if (mine) {
    const int at = neighbours ? channel[0] % HALF_D : thread;
    store_shared_float(base + Pairs<S>::FREQUENCY + 4 * at, a.frequency[h * HALF_D + thread]);
    store_shared_float(base + Pairs<S>::SCALE + 4 * at, a.pair_scale[h * HALF_D + thread]);
    store_shared_16(base + Pairs<S>::CHANNELS + 2 * at, channel[0] | channel[1] << 8);
    for (int k = 0; k < 2; k++) {
      // Without RoPE there are no pairs: any channel may come first.
      const int place = neighbours ? channel[k] % HALF_D : thread, second = neighbours ? channel[k] / HALF_D : k;
      store_shared_16(base + Pairs<S>::MEAN + place / 4 * 16 + place % 4 / 2 * 8 + second * 4 + place % 2 * 2,
                      pack_half2(a.mean[h * S::D + 2 * thread + k], 0.0f));
    }
  }
  return neighbours;
}

// Tables of a kv head into shared memory. A key's centroid gets its mean here, so that no token pays for it.
// Neighbouring threads write neighbouring columns; the threads after them read what follows in the same tables. While
// the loads are on their way, pairs are sorted; returns what `sort_pairs` does.
template <class S>
DEVICE bool fill_tables(const Arguments& a, int h, uint8_t* memory, int thread) {
  typedef Piece<S::KEY_ENTRY, S::KEY_SPREAD> Key;
  typedef Piece<S::VALUE_ENTRY, S::VALUE_SPREAD> Value;
  constexpr int KEY_COLUMNS = 4 * S::KEY_WAYS, VALUE_COLUMNS = 2 * S::VALUE_WAYS;
  constexpr int KEY_PIECES = KEY_COLUMNS * 256 / Key::CODES, VALUE_PIECES = VALUE_COLUMNS * 256 / Value::CODES;
  constexpr int KEY_ROUNDS = (KEY_PIECES + S::THREADS - 1) / S::THREADS;
  constexpr int VALUE_ROUNDS = (VALUE_PIECES + S::THREADS - 1) / S::THREADS;
  constexpr int KEYS_PER_LANE = S::KEY_WAYS * S::KEY_SECTIONS, PER_STEP = 8 / S::VALUE_WAYS;  // entries; sections
  const uint32_t base = shared_address(memory);
  const int key_column = thread % KEY_COLUMNS, value_column = thread % VALUE_COLUMNS;
  uint32_t key[S::KEY_SECTIONS][KEY_ROUNDS][Key::WORDS], value[S::VALUE_SECTIONS][VALUE_ROUNDS][Value::WORDS];
  const int key_entry = key_column / S::KEY_WAYS * KEYS_PER_LANE + key_column % S::KEY_WAYS;
#pragma unroll
  for (int section = 0; section < S::KEY_SECTIONS; section++) {
    const int entry = key_entry + section * S::KEY_WAYS;
    const uint16_t* from = a.key_centroids + (h * S::KEY_WIDTH + entry / S::KEY_SPREAD) * (256 * S::KEY_DIM) +
                           entry % S::KEY_SPREAD * S::KEY_ENTRY;
#pragma unroll
    for (int j = 0; j < KEY_ROUNDS; j++)
      if (thread + j * S::THREADS < KEY_PIECES)
        load_piece(from + (thread + j * S::THREADS) / KEY_COLUMNS * (Key::CODES * S::KEY_DIM), key[section][j]);
  }
#pragma unroll
  for (int section = 0; section < S::VALUE_SECTIONS; section++) {
    const int lane = section % PER_STEP * S::VALUE_WAYS + value_column / 2;
    const int entry = lane * S::VALUE_PER_LANE + section / PER_STEP * 2 + value_column % 2;
    const uint16_t* from = a.value_centroids + (h * S::VALUE_WIDTH + entry / S::VALUE_SPREAD) * (256 * S::VALUE_DIM) +
                           entry % S::VALUE_SPREAD * S::VALUE_ENTRY;
#pragma unroll
    for (int j = 0; j < VALUE_ROUNDS; j++)
      if (thread + j * S::THREADS < VALUE_PIECES)
        load_piece(from + (thread + j * S::THREADS) / VALUE_COLUMNS * (Value::CODES * S::VALUE_DIM), value[section][j]);
  }
  const bool neighbours = sort_pairs<S>(a, h, base, thread);
#pragma unroll
  for (int section = 0; section < S::KEY_SECTIONS; section++) {
    float mean[S::KEY_ENTRY];
    for (int k = 0; k < S::KEY_ENTRY; k++)
      mean[k] = a.mean[h * S::D + (key_entry + section * S::KEY_WAYS) * S::KEY_ENTRY + k];
#pragma unroll
    for (int j = 0; j < KEY_ROUNDS; j++) {
      const int code = (thread + j * S::THREADS) / KEY_COLUMNS * Key::CODES;
      uint32_t(&piece)[Key::WORDS] = key[section][j];
      if (code >= 256) break;
#pragma unroll
      for (int k = 0; k < Key::WORDS; k++)
        piece[k] = pack_half2(half_to_float((uint16_t)piece[k]) + mean[2 * k % S::KEY_ENTRY],
                              half_to_float((uint16_t)(piece[k] >> 16)) + mean[(2 * k + 1) % S::KEY_ENTRY]);
      if constexpr (S::KEY_ENTRY >= 4)
        for (int k = 0; k < Key::WORDS; k += 2) gather_pairs(piece[k], piece[k + 1]);
      store_entries<S::KEY_ENTRY / 2>(
          base + S::KEY_TABLE + section * SECTION + code * 128 + key_column * (2 * S::KEY_ENTRY), piece);
    }
  }
#pragma unroll
  for (int section = 0; section < S::VALUE_SECTIONS; section++)
#pragma unroll
    for (int j = 0; j < VALUE_ROUNDS; j++) {
      const int index = (thread + j * S::THREADS) / VALUE_COLUMNS, code = index * Value::CODES;
      if (code >= 256) break;
      for (int copy = 0; copy < 2; copy++)  // half of the threads begin with the other one: another column
        store_entries<S::VALUE_ENTRY / 2>(base + S::VALUE_TABLE + section * SECTION + code * 128 +
                                              (value_column * 2 + (copy ^ (index & 1))) * (2 * S::VALUE_ENTRY),
                                          value[section][j]);
    }
  return neighbours;
}

// Raises the maxima of a lane's two columns if one of `logits` is far above, and scales what was summed under them. All
// lanes of a column keep the same maximum.
template <int COUNT>
DEVICE void raise_maximum(const float (&logits)[4], float (&maximum)[2], float (&total)[2], float (&out)[COUNT][4]) {
  float peak[2];
  for (int k = 0; k < 2; k++) peak[k] = largest(logits[k], logits[2 + k]);
  if (!any_lane(peak[0] > maximum[0] + 8.0f || peak[1] > maximum[1] + 8.0f)) return;
  for (int k = 0; k < 2; k++) {
    for (int lanes = 4; lanes < 32; lanes *= 2) peak[k] = largest(peak[k], shuffle_xor(peak[k], lanes));
    const float raised = largest(maximum[k], peak[k]), decay = exp2_fast(maximum[k] - raised);
    maximum[k] = raised;
    total[k] *= decay;
    for (int i = 0; i < COUNT; i++) out[i][k] *= decay, out[i][2 + k] *= decay;
  }
}
