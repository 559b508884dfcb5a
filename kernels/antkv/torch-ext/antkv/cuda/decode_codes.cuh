// Attention of a few queries over packed codes: centroids are gathered from shared memory straight into the fragments
// of tensor-core products.
//
// A sub-vector is 8 channels = 16 bytes, one row of `ldmatrix`, which reads eight rows at once if they lie in different
// 16-byte columns of shared memory. Codes are random, so a table in which a sub-vector owns a column lets eight tokens
// of a matrix read eight different sub-vectors without a conflict: in step x token r reads sub-vector x ^ r.
// - Keys: registers then hold sub-vectors in another order in each row r. Two rounds of exchanges between registers
//   put them in order, but for the lowest bit of r: up to four query rows fill half of a product's columns, and the
//   other half holds the query's next sub-vector. Five to eight rows take a third round.
// - Values: a product's rows are (slot, query row) with the probability where the token reads that slot and 0
//   elsewhere; what comes out is in order.
// Keys are coded before RoPE: a warp always takes the same 16 tokens of a span of 16 * WARPS, whose angles never change,
// and the query is turned to the start of each span once for the whole block.

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
  int query_is_bfloat, is_bfloat, anchor_kind, hides_padding, causal;  // is_bfloat: sinks, tail; anchor_kind: 0 none, 1 int8, 2 float16
  float scale_log2;  // of q.k, times log2(e)
  float softcap_log2;  // 0: none
};

constexpr float LOWEST = -1e30f;
constexpr int SPANS_AHEAD = 8;  // spans whose queries are turned at a time

DEVICE float load_16(const uint16_t* p, int is_bfloat) { return is_bfloat ? bfloat_to_float(*p) : half_to_float(*p); }

// Sine and cosine of a position's angle to 1e-5: whole turns are taken off first.
DEVICE void sin_cos(float angle, float& sine, float& cosine) {
  float turns = round_to_even(angle * 0.15915494309189535f);
  float rest = fused_multiply_add(turns, -6.28125f, angle);
  rest = fused_multiply_add(turns, -1.9353071795864769e-3f, rest);
  sine = sin_fast(rest);
  cosine = cos_fast(rest);
}

template <int HEAD_DIM, int ROW_GROUPS, int KEY_SPREAD_, int VALUE_SPREAD_, int WARPS, bool ROTATES_, bool SOFTCAP_>
struct Shape {
  static constexpr bool ROTATES = ROTATES_, SOFTCAP = SOFTCAP_;
  static constexpr int D = HEAD_DIM, SUBS = D / 8, SLOTS = SUBS / 2, GROUPS = ROW_GROUPS, ROWS = 4 * ROW_GROUPS;
  // Sub-vectors that a code stands for: 1 if it has 8 channels, 2 if 16.
  static constexpr int KEY_SPREAD = KEY_SPREAD_, VALUE_SPREAD = VALUE_SPREAD_;
  static constexpr int COPIES = 8 / SLOTS;  // of the keys' table, so that eight tokens find eight columns
  static constexpr int THREADS = 32 * WARPS, SPAN = 16 * WARPS;
  static constexpr int KEY_WIDTH = SUBS / KEY_SPREAD, VALUE_WIDTH = SUBS / VALUE_SPREAD;
  static constexpr int AHEAD = SPANS_AHEAD / ROW_GROUPS;
  static constexpr int QUERY_BYTES = SUBS * ROWS * 16;  // one turned query
  static constexpr int KEY_TABLE = 0, VALUE_TABLE = 2 * 32768, QUERIES = VALUE_TABLE + SUBS / 4 * 32768;
  static constexpr int PROBS = QUERIES + 2 * AHEAD * QUERY_BYTES, PROBS_BYTES = ROWS * 32;
  static constexpr int AFTER_LOOP = QUERIES;  // warps' sums share the place of queries and probabilities
  static constexpr int SUMS = AFTER_LOOP + 2 * WARPS * ROWS * 4;
  static constexpr int END_OF_LOOP = PROBS + WARPS * PROBS_BYTES, END_OF_SUMS = SUMS + WARPS * ROWS * D * 4;
  static constexpr int BYTES = END_OF_LOOP > END_OF_SUMS ? END_OF_LOOP : END_OF_SUMS;
};

// What every lane keeps of the online softmax over codes.
template <class S>
struct CodeSums {
  float maximum[2], total[2];            // of the query rows of the lane's two columns
  float out[S::GROUPS][S::SUBS / 4][4];  // 16 rows (slot, query row) x 8 channels
};

// Codes of the lane's token and half: byte i becomes the code that the lane reads in step i (or steps 2i, 2i + 1).
template <int SLOTS, int SPREAD>
DEVICE void order_codes(uint64_t codes, int xor_mask, uint32_t (&words)[2]) {
  int mask = xor_mask / SPREAD;
  uint32_t low = (uint32_t)codes, high = (uint32_t)(codes >> 32);
  if (SLOTS / SPREAD == 8) {
    uint32_t swapped = mask & 4 ? high : low;
    high = mask & 4 ? low : high;
    low = swapped;
  }
  uint32_t selector = 0x3210u ^ ((uint32_t)(mask & 3) * 0x1111u);
  if (SLOTS / SPREAD == 2) selector = 0x3210u ^ ((uint32_t)(mask & 1) * 0x0011u);
  words[0] = permute_bytes(low, low, selector);
  words[1] = SLOTS / SPREAD == 8 ? permute_bytes(high, high, selector) : 0u;
}

template <int WIDTH>
DEVICE uint64_t load_codes(const uint8_t* p) {
  return WIDTH == 8 ? load_once_64(p) : WIDTH == 4 ? (uint64_t)load_once_32(p) : (uint64_t)load_once_16(p);
}

// Tables of a kv head into shared memory. A key's centroid gets its mean here, so that no token pays for it.
template <class S>
DEVICE void fill_tables(const Arguments& a, int h, uint8_t* memory, int thread) {
  constexpr int BATCH = 8;  // loads on their way at a time
  const uint32_t base = shared_address(memory);
  // Eight threads in a row write eight columns; every eighth reads the next code of the same table.
  for (int first = thread; first < S::SUBS * 256; first += BATCH * S::THREADS) {
    uint32_t key[BATCH][4], value[BATCH][4];
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      const int i = first + j * S::THREADS, sub = i % 8 + i / 2048 * 8, code = i / 8 % 256;
      if (i >= S::SUBS * 256) break;
      const int key_group = h * S::KEY_WIDTH + sub / S::KEY_SPREAD, value_group = h * S::VALUE_WIDTH + sub / S::VALUE_SPREAD;
      load_128(a.key_centroids + ((key_group * 256 + code) * S::KEY_SPREAD + sub % S::KEY_SPREAD) * 8, key[j]);
      load_128(a.value_centroids + ((value_group * 256 + code) * S::VALUE_SPREAD + sub % S::VALUE_SPREAD) * 8, value[j]);
    }
#pragma unroll
    for (int j = 0; j < BATCH; j++) {
      const int i = first + j * S::THREADS, sub = i % 8 + i / 2048 * 8, code = i / 8 % 256;
      if (i >= S::SUBS * 256) break;
      uint32_t mean[2][4];
      for (int k = 0; k < 2; k++) load_128(a.mean + h * S::D + sub * 8 + 4 * k, mean[k]);
#pragma unroll
      for (int k = 0; k < 4; k++)
        key[j][k] = pack_half2(half_to_float((uint16_t)key[j][k]) + as_float(mean[k / 2][k % 2 * 2]),
                               half_to_float((uint16_t)(key[j][k] >> 16)) + as_float(mean[k / 2][k % 2 * 2 + 1]));
      const uint32_t key_place = base + S::KEY_TABLE + sub / S::SLOTS * 32768 + code * 128 + sub % S::SLOTS * (16 * S::COPIES);
      for (int copy = 0; copy < S::COPIES; copy++) store_shared_128(key_place + copy * 16, key[j]);
      const uint32_t value_place = base + S::VALUE_TABLE + sub / 4 * 32768 + code * 128 + sub % 4 * 32;
      // Sub-vectors 4 to 7 go to the columns of 0 to 3: the other copy first, and the eight columns differ.
      for (int copy = 0; copy < 2; copy++) store_shared_128(value_place + (copy ^ (sub / 4 % 2)) * 16, value[j]);
    }
  }
}

// Queries in latent order for the spans first, first + SPAN, ...: ``R(-(first - offset) frequency) q scale``, as
// [span][sub-vector][query row][8 channels] of float16.
template <class S>
DEVICE void turn_queries(const Arguments& a, int b, int h, int first, int offset, uint32_t to, int thread) {
  int rows = a.group * a.q_len;
  for (int i = thread; i < S::ROWS * S::D / 2; i += S::THREADS) {
    int row = i / (S::D / 2), pair = i % (S::D / 2);
    float x = 0.0f, y = 0.0f, sine = 0.0f, cosine = 1.0f, step_sine = 0.0f, step_cosine = 1.0f;
    if (row < rows) {
      const uint16_t* q = a.query + b * a.query_stride_b + (int64_t)(h * a.group + row / a.q_len) * a.query_stride_h +
                          (row % a.q_len) * a.query_stride_n;
      x = load_16(q + a.channels[h * S::D + 2 * pair], a.query_is_bfloat) * a.scale_log2;
      y = load_16(q + a.channels[h * S::D + 2 * pair + 1], a.query_is_bfloat) * a.scale_log2;
    }
    if (S::ROTATES) {
      float frequency = a.frequency[h * (S::D / 2) + pair];
      sin_cos((float)(first - offset) * frequency, sine, cosine);
      sin_cos((float)S::SPAN * frequency, step_sine, step_cosine);
      float turned = x * cosine + y * sine;
      y = y * cosine - x * sine;
      x = turned;
    }
    uint32_t place = to + pair / 4 * (S::ROWS * 16) + row * 16 + pair % 4 * 4;
    for (int span = 0; span < S::AHEAD; span++) {
      store_shared_32(place + span * S::QUERY_BYTES, pack_half2(x, y));
      float turned = x * step_cosine + y * step_sine;
      y = y * step_cosine - x * step_sine;
      x = turned;
    }
  }
}

// (x, y) of float16 -> (y, -x).
DEVICE uint32_t quarter_turn(uint32_t xy) { return permute_bytes(xy, xy, 0x1032) ^ 0x80000000u; }

// Tokens g and g + 8 of the warp's tile and two columns each: ``logits[2 i + k]`` for token g + 8 i.
// `key_words`: the lane's codes in the order of its steps. `queries`: one turned query in shared memory.
// With q' = (q_y, -q_x) a turned key is never needed: ``q . R(t) k = sum over pairs of cos (q . k) + sin (q' . k)``.
template <class S>
DEVICE void tile_logits(const uint32_t (&key_words)[2], const uint32_t (&key_place)[S::SLOTS],
                        const uint32_t (&cos_sin)[S::SLOTS][4], uint32_t queries, int lane, float (&logits)[4]) {
  constexpr int SLOTS = S::SLOTS, CLASSES = S::GROUPS == 1 ? 2 : 1, COUNT = SLOTS / CLASSES;
  const int g = lane / 4, c = lane % 4;
  float sums[2][2][4];  // of steps of either parity, of cosines and sines
  for (int i = 0; i < 16; i++) sums[i / 8][i / 4 % 2][i % 4] = 0.0f;
  uint32_t query[COUNT][2];  // fragments of 16 channels: of two steps if rows fill half of the columns, else of one
#pragma unroll
  for (int i = 0; i < COUNT; i += 2) {
    uint32_t both[4];
    load_matrices(queries + i * 128, both);
    query[i][0] = both[0], query[i][1] = both[1], query[i + 1][0] = both[2], query[i + 1][1] = both[3];
  }
#pragma unroll
  for (int parity = 0; parity < CLASSES; parity++) {
    uint32_t key[COUNT][4];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const int step = CLASSES * i + parity, byte = step / S::KEY_SPREAD;
      load_settled_matrices(times_128_plus(key_words[byte / 4], byte % 4, key_place[step]), key[i]);
    }
#pragma unroll
    for (int bit = COUNT / 2; bit > 0; bit /= 2) {
      const bool exchange = (g & (CLASSES * bit)) != 0;
#pragma unroll
      for (int i = 0; i < COUNT; i++)
        if ((i & bit) == 0)
#pragma unroll
          for (int k = 0; k < 4; k++) {
            const uint32_t p = key[i][k], q = key[i | bit][k];
            key[i][k] = exchange ? q : p;
            key[i | bit][k] = exchange ? p : q;
          }
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      uint32_t(&k)[4] = key[i];
      const uint32_t(&q)[2] = query[i];
      const int step = CLASSES * i + parity, class_of = S::GROUPS == 1 ? parity : i % 2;
      if (S::ROTATES) {
        uint32_t by_cos[4], by_sin[4];
#pragma unroll
        for (int j = 0; j < 4; j++) times_each(k[j], cos_sin[step][j], by_cos[j], by_sin[j]);
        multiply_add(sums[class_of][0], by_cos[0], by_cos[1], by_cos[2], by_cos[3], q[0], q[1]);
        multiply_add(sums[class_of][1], by_sin[0], by_sin[1], by_sin[2], by_sin[3], quarter_turn(q[0]), quarter_turn(q[1]));
      } else {
        multiply_add(sums[class_of][0], k[0], k[1], k[2], k[3], q[0], q[1]);
      }
    }
  }
  // With up to four rows, row g holds sub-vector step ^ (g & 1): for even steps the lower half of the columns has its
  // query in even rows, the upper half in odd ones; for odd steps it is the other way round.
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const float of_even = sums[0][0][k] + sums[0][1][k], of_odd = sums[1][0][k] + sums[1][1][k];
    if (S::GROUPS == 1) {
      logits[k] = c / 2 == g % 2 ? of_even : of_odd;
      logits[k] += shuffle_xor(logits[k], 2);
    } else {
      logits[k] = of_even + of_odd;
    }
  }
}

// Adds the values of a tile, of which a lane names the codes and has probabilities of its slots and tokens.
template <class S>
DEVICE void add_values(const uint32_t (&value_words)[2], const uint32_t (&value_place)[4], const uint32_t (&keep)[4][2],
                       const uint32_t (&prob)[S::GROUPS][2], CodeSums<S>& sums) {
#pragma unroll
  for (int i = 0; i < S::SLOTS; i++) {
    const int byte = i / S::VALUE_SPREAD;
    const uint32_t place = times_128_plus(value_words[byte / 4], byte % 4, value_place[i % 4]);
    uint32_t value[4];
    if (i / 4 == 0) load_settled_transposed<0>(place, value);
    else load_settled_transposed<32768>(place, value);
#pragma unroll
    for (int group = 0; group < S::GROUPS; group++) {
      uint32_t p[4];
      for (int k = 0; k < 4; k++) p[k] = prob[group][k / 2] & keep[i % 4][k % 2];
      multiply_add(sums.out[group][i / 4], p[0], p[1], p[2], p[3], value[0], value[1]);
      multiply_add(sums.out[group][S::SLOTS / 4 + i / 4], p[0], p[1], p[2], p[3], value[2], value[3]);
    }
  }
}

// Adds the coded tokens first..last-1 of (b, h); `first` is a multiple of 16. All warps of the block take part.
template <class S>
DEVICE void attend_codes(const Arguments& a, int b, int h, int first, int last, uint8_t* memory, int thread,
                         CodeSums<S>& sums) {
  constexpr int SLOTS = S::SLOTS;
  const int warp = thread / 32, lane = thread % 32, g = lane / 4, c = lane % 4;
  const int token = lane % 16, half = lane / 16;  // whose codes the lane reads
  const uint32_t base = settled(shared_address(memory));
  const int64_t bh = (int64_t)b * a.heads + h;
  const int offset = (int)a.offset[b];
  const int lowest = a.hides_padding ? offset : 0;

  // Angles of the keys' pairs of rows g and g + 8, for the sub-vectors that the lane holds in each step.
  uint32_t cos_sin[SLOTS][4];
  if (S::ROTATES) {
#pragma unroll
    for (int x = 0; x < SLOTS; x++)
#pragma unroll
      for (int k = 0; k < 4; k++) {
        int sub = (k / 2) * SLOTS + (x ^ (S::GROUPS == 1 ? g & 1 : 0)), pair = h * (S::D / 2) + sub * 4 + c;
        float sine, cosine, scale = a.pair_scale[pair];
        sin_cos((float)(warp * 16 + g + (k % 2) * 8) * a.frequency[pair], sine, cosine);
        cos_sin[x][k] = pack_half2(cosine * scale, sine * scale);
      }
  }
  const int key_mask = token % SLOTS, value_mask = token % 4;
  uint32_t key_place[SLOTS], value_place[4], keep[4][2];
#pragma unroll
  for (int x = 0; x < SLOTS; x++)
    key_place[x] = base + S::KEY_TABLE + half * 32768 + (x ^ key_mask) * (16 * S::COPIES) + token % 8 / SLOTS * 16;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    value_place[i] = base + S::VALUE_TABLE + half * (SLOTS / 4) * 32768 + (i ^ value_mask) * 32 + token % 8 / 4 * 16;
    for (int k = 0; k < 2; k++) {  // rows g, g + 8 of the probabilities are (slot, query row)
      int slot = g / 4 + 2 * k;
      keep[i][k] = (((i ^ (2 * c)) & 3) == slot ? 0x0000ffffu : 0u) | (((i ^ (2 * c + 1)) & 3) == slot ? 0xffff0000u : 0u);
    }
  }
  // Query fragments: lane l names row l % 8 of matrix l / 8, which are (step or pair of steps, half).
  const uint32_t query_place = base + S::QUERIES + lane % 8 * 16 + lane / 8 % 2 * (SLOTS * S::ROWS * 16) + lane / 16 * 128;
  // Four query rows fill half of the columns: lanes 2 and 3 of a row repeat what lanes 0 and 1 know.
  const int column_row = S::GROUPS == 1 ? 2 * (c % 2) : 2 * c;  // query row of the lane's first column
  const uint32_t probs = base + S::PROBS + warp * S::PROBS_BYTES;

  const int start_of_lane = first + warp * 16 + token;
  const uint8_t* key_codes = a.key_codes + (bh * a.capacity + start_of_lane) * S::KEY_WIDTH + half * (S::KEY_WIDTH / 2);
  const uint8_t* value_codes =
      a.value_codes + (bh * a.capacity + start_of_lane) * S::VALUE_WIDTH + half * (S::VALUE_WIDTH / 2);
  const uint8_t* bits = a.exact_bits + bh * a.bits_width + first / 8 + warp * 2 + lane % 2;
  uint64_t next_key = 0, next_value = 0;
  uint32_t next_hidden = 0;  // bits of tokens 0..7 in even lanes, of 8..15 in odd ones
  if (start_of_lane < last) {
    next_key = load_codes<S::KEY_WIDTH / 2>(key_codes);
    next_value = load_codes<S::VALUE_WIDTH / 2>(value_codes);
  }
  if (first + warp * 16 + lane % 2 * 8 < last) next_hidden = *bits;
  // A tile's values are added while the next tile's logits are computed: neither waits for the other.
  uint32_t pending[2] = {0, 0}, prob[S::GROUPS][2];
  for (int group = 0; group < S::GROUPS; group++) prob[group][0] = prob[group][1] = 0;
  int buffer = 0;
  for (int start = first; start < last; start += S::AHEAD * S::SPAN, buffer ^= 1) {
    const uint32_t queries = S::AHEAD * S::QUERY_BYTES * buffer;
    turn_queries<S>(a, b, h, start, offset, base + S::QUERIES + queries, thread);
    sync_block();  // two buffers: nobody writes one before everybody has passed the barrier after reading it
#pragma unroll 1
    for (int span = 0; span < S::AHEAD; span++) {
      const int tile = start + span * S::SPAN + warp * 16;
      if (tile >= last) break;
      uint32_t key_words[2], value_words[2];
      order_codes<SLOTS, S::KEY_SPREAD>(next_key, key_mask, key_words);
      order_codes<SLOTS, S::VALUE_SPREAD>(next_value, value_mask, value_words);
      const uint32_t hidden = next_hidden;
      key_codes += S::SPAN * S::KEY_WIDTH;
      value_codes += S::SPAN * S::VALUE_WIDTH;
      bits += S::SPAN / 8;
      if (tile + S::SPAN + token < last) {
        next_key = load_codes<S::KEY_WIDTH / 2>(key_codes);
        next_value = load_codes<S::VALUE_WIDTH / 2>(value_codes);
      }
      if (tile + S::SPAN + lane % 2 * 8 < last) next_hidden = *bits;

      float logits[4];
      tile_logits<S>(key_words, key_place, cos_sin, query_place + queries + span * S::QUERY_BYTES, lane, logits);

      add_values<S>(pending, value_place, keep, prob, sums);

      // Softmax: tokens g and g + 8, the query rows of two columns. The maximum is raised only when it must be.
      if (S::SOFTCAP)
#pragma unroll
        for (int k = 0; k < 4; k++) logits[k] = a.softcap_log2 * tanh_of(logits[k] / a.softcap_log2);
      const uint32_t hidden_both = hidden | shuffle_bits_xor(hidden, 1) << 8;  // right in even lanes
      const uint32_t hidden_here = shuffle_bits(hidden_both, 0) >> g;
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const int position = tile + g + 8 * k;
        const bool visible = position < last && position >= lowest && ((hidden_here >> (8 * k)) & 1u) == 0;
        if (!visible) logits[2 * k] = logits[2 * k + 1] = minus_infinity();
      }
      float(&maximum)[2] = sums.maximum;
      float(&total)[2] = sums.total;
      float peak[2];
      for (int k = 0; k < 2; k++) peak[k] = largest(logits[k], logits[2 + k]);
      if (any_lane(peak[0] > maximum[0] + 8.0f || peak[1] > maximum[1] + 8.0f)) {
        float decay[2];
        for (int k = 0; k < 2; k++) {
          for (int lanes = 4; lanes < 32; lanes *= 2) peak[k] = largest(peak[k], shuffle_xor(peak[k], lanes));
          const float raised = largest(maximum[k], peak[k]);
          decay[k] = exp2_fast(maximum[k] - raised);
          maximum[k] = raised;
          total[k] *= decay[k];
        }
        for (int group = 0; group < S::GROUPS; group++) {
          // Rows g and g + 8 of `out` belong to query row g % 4 of the group, a column of lane row / 2.
          const int row = g % 4 + 4 * group;
          const float first_column = shuffle(decay[0], row / 2), second_column = shuffle(decay[1], row / 2);
          const float factor = row % 2 ? second_column : first_column;
          for (int j = 0; j < S::SUBS / 4; j++)
            for (int k = 0; k < 4; k++) sums.out[group][j][k] *= factor;
        }
      }
      float p[4];
#pragma unroll
      for (int k = 0; k < 4; k++) p[k] = exp2_fast(logits[k] - maximum[k % 2]);
      for (int k = 0; k < 2; k++) total[k] += p[k] + p[2 + k];

      // Probabilities to where the next product wants them: [query row][16 tokens] of float16.
      sync_warp();
      if (S::GROUPS == 1) {  // of lanes that know the same, one stores token g and the other g + 8
        const uint32_t both = c < 2 ? pack_half2(p[0], p[1]) : pack_half2(p[2], p[3]);
        const uint32_t place = probs + column_row * 32 + g * 2 + c / 2 * 16;
        store_shared_16(place, both);
        store_shared_16(place + 32, both >> 16);
      } else {
        const uint32_t low = pack_half2(p[0], p[1]), high = pack_half2(p[2], p[3]);
        const uint32_t place = probs + column_row * 32 + g * 2;
        store_shared_16(place, low);
        store_shared_16(place + 32, low >> 16);
        store_shared_16(place + 16, high);
        store_shared_16(place + 48, high >> 16);
      }
      sync_warp();
#pragma unroll
      for (int group = 0; group < S::GROUPS; group++) {
        const uint32_t place = probs + (group * 4 + g % 4) * 32 + c * 4;
        prob[group][0] = load_shared_32(place);
        prob[group][1] = load_shared_32(place + 16);
      }
      for (int k = 0; k < 2; k++) pending[k] = value_words[k];
    }
  }
  add_values<S>(pending, value_place, keep, prob, sums);
}
