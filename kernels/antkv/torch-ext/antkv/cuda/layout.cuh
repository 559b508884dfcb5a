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
  const uint16_t* key_centroids;  // (kv_heads, groups, stages, 256, sub_dim), float16
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
constexpr int SPANS_AHEAD = 16;  // spans whose queries all teams of a block turn at a time
constexpr int TURNS_OF_A_QUERY = 16;  // so often a team turns its spans on before it begins anew, which bounds rounding

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

// A lane's codes of a token, `CODES` of each stage, in a row of `WIDTH` bytes. Those of one or two stages fill 1 to 16
// bytes, which one load brings. Those of three begin anywhere: two loads of `UNIT` bytes, a window, bring two of each.
template <int WIDTH_, int CODES_, int STAGES_>
struct LaneCodes {
  static constexpr int WIDTH = WIDTH_, CODES = CODES_, STAGES = STAGES_, BYTES = CODES * STAGES;
  static constexpr int UNIT = WIDTH % 4 ? 2 : 4, WINDOWS = STAGES == 3 ? (CODES + 1) / 2 : 1;
  static constexpr int LOADED = STAGES == 3 ? 2 * WINDOWS : BYTES < 4 ? 1 : BYTES / 4;  // words
  static constexpr int STRIDE = STAGES == 3 ? 4 : STAGES;  // bytes from a code to the next, once they are in order
};

// KEY_DIM, VALUE_DIM: channels that a code stands for; of each group of channels there is a code a stage, whose
// centroids are added. An entry is what one read of a table brings: a code's channels, eight at most.
// VALUE_COPIES: 2 if the last stage of values has a second copy of its table, which an odd number of stages needs
// against bank conflicts (see decode_codes.cuh); 1 if not.
// TEAMS: a block's warps are one team or several, each of which takes shares of sequences on its own: what one waits for,
// queries, exact tokens, sums, then takes no time of the others.
template <int HEAD_DIM, int ROW_GROUPS, int KEY_DIM_, int KEY_STAGES_, int VALUE_DIM_, int VALUE_STAGES_,
          int VALUE_COPIES, int WARPS, int TEAMS_, bool ROTATES_, bool SOFTCAP_>
struct Shape {
  static constexpr bool ROTATES = ROTATES_, SOFTCAP = SOFTCAP_;
  static constexpr int D = HEAD_DIM, GROUPS = ROW_GROUPS, ROWS = 4 * ROW_GROUPS;
  static constexpr int KEY_DIM = KEY_DIM_, VALUE_DIM = VALUE_DIM_;
  static constexpr int KEY_STAGES = KEY_STAGES_, VALUE_STAGES = VALUE_STAGES_;
  static constexpr int THREADS = 32 * WARPS, TEAMS = TEAMS_, TEAM_WARPS = WARPS / TEAMS;
  static_assert(WARPS % TEAMS == 0, "teams have as many warps each");
  static constexpr int TEAM_THREADS = 32 * TEAM_WARPS, SPAN = 16 * TEAM_WARPS;
  // Several teams keep the query that comes next in float32, which takes the place of one span's in both buffers.
  static constexpr bool KEEPS_TURNED = TEAMS > 1;
  static constexpr int AHEAD = SPANS_AHEAD / ROW_GROUPS / TEAMS - KEEPS_TURNED;
  static constexpr int KEY_GROUPS = D / KEY_DIM, VALUE_GROUPS = D / VALUE_DIM;  // of channels that share a code
  static constexpr int KEY_ENTRY = KEY_DIM < 8 ? KEY_DIM : 8, VALUE_ENTRY = VALUE_DIM < D / 16 ? VALUE_DIM : D / 16;
  static constexpr int KEY_SPREAD = KEY_DIM / KEY_ENTRY, VALUE_SPREAD = VALUE_DIM / VALUE_ENTRY;  // entries of a code
  // A section is 256 rows of 128 bytes, one a code. Keys: `KEY_WAYS` entries of each of a token's four lanes.
  static constexpr int KEY_WAYS = 16 / KEY_ENTRY, KEY_SECTIONS = D / 64;  // a stage
  // Values: two entries of each of `VALUE_WAYS` lanes, of two tables: those of two stages, or copies.
  static constexpr int VALUE_WAYS = 16 / VALUE_ENTRY, VALUE_SECTIONS = D / 32;  // two tables
  static constexpr int VALUE_TABLES = VALUE_STAGES - 1 + VALUE_COPIES;
  static constexpr int VALUE_PER_LANE = D / VALUE_ENTRY / 8, VALUE_STEPS = VALUE_PER_LANE / 2;
  // Places where a lane reads: in the tables of two stages, or its copy; in a table that is alone.
  static constexpr int VALUE_PLACES = (VALUE_STAGES > 1 ? 2 : VALUE_TABLES / 2) + VALUE_TABLES % 2;
  // Lanes that share a code all read it.
  typedef LaneCodes<KEY_GROUPS * KEY_STAGES, KEY_GROUPS < 4 ? 1 : KEY_GROUPS / 4, KEY_STAGES> Key;
  typedef LaneCodes<VALUE_GROUPS * VALUE_STAGES, VALUE_GROUPS < 8 ? 1 : VALUE_GROUPS / 8, VALUE_STAGES> Value;
  // Windows of a row are at no even distances: packed_codes.cuh finds the first two of keys, and one of values.
  static_assert(Key::WINDOWS <= 2 && Value::WINDOWS == 1, "three stages: more codes a lane than are read in order");
  static constexpr int KEY_WORDS = KEY_STAGES == 3 ? Key::CODES : Key::LOADED;
  static constexpr int VALUE_BYTES = VALUE_STAGES == 3 ? 4 * Value::CODES : Value::BYTES < 2 ? 2 : Value::BYTES;
  static constexpr int VALUE_WORDS = VALUE_BYTES;  // of four tokens' codes
  static constexpr int QUERY_BYTES = D * ROWS * 2;  // one turned query
  static constexpr int KEY_TABLE = 0, VALUE_TABLE = KEY_STAGES * KEY_SECTIONS * SECTION;
  static constexpr int PAIRS = VALUE_TABLE + VALUE_TABLES * (VALUE_SECTIONS / 2) * SECTION;
  // What a team has of its own: queries, whose place its warps' sums take.
  static constexpr int WORK = PAIRS + 11 * D, TURNED = 2 * AHEAD * QUERY_BYTES, SUMS = 2 * TEAM_WARPS * ROWS * 4;
  static constexpr int QUERIES_BYTES = TURNED + KEEPS_TURNED * 2 * QUERY_BYTES;
  static constexpr int SUMS_BYTES = SUMS + TEAM_WARPS * ROWS * D * 4;
  static constexpr int WORK_BYTES = QUERIES_BYTES > SUMS_BYTES ? QUERIES_BYTES : SUMS_BYTES;
  static constexpr int BYTES = WORK + TEAMS * WORK_BYTES;
};

// A thread's team: which of the block's it is, and where in shared memory the block's tables and its own work are.
template <class S>
struct Team {
  int number, thread;  // of its TEAM_THREADS
  uint32_t base, work;

  DEVICE Team(uint32_t base, int of_block)
      : number(S::TEAMS == 1 ? 0 : uniform(of_block / S::TEAM_THREADS)),
        thread(S::TEAMS == 1 ? of_block : of_block % S::TEAM_THREADS),
        base(base),
        work(base + S::WORK + number * S::WORK_BYTES) {}
  DEVICE int warp() const { return thread / 32; }
  DEVICE int lane() const { return thread % 32; }
  DEVICE void sync() const {
    if constexpr (S::TEAMS == 1) sync_block();
    else sync_some(1 + number, S::TEAM_THREADS);
  }
};

// Where the values' table of a stage is. Tables stand two by two in the columns of the same sections; one that is left
// over has half as many sections, in which what would be every second one takes the columns of the other table.
template <class S, int STAGE>
struct ValueStage {
  static constexpr bool ALONE = STAGE == S::VALUE_TABLES - 1 && STAGE % 2 == 0;
  static constexpr bool TWICE = STAGE == S::VALUE_STAGES - 1 && STAGE % 2 == 0 && !ALONE;
  static constexpr int FIRST = STAGE / 2 * S::VALUE_SECTIONS * SECTION;  // from VALUE_TABLE on
  static constexpr int PLACE = ALONE ? S::VALUE_PLACES - 1 : STAGE % 2;  // of VALUE_PLACES
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
  static constexpr int STEP = CHANNELS + S::D;  // cosine and sine of a span's angles, in the order of `turn_queries`
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
    float sine, cosine;
    sin_cos((float)S::SPAN * a.frequency[h * HALF_D + thread], sine, cosine);
    const int eight = thread / 4, step = eight % (S::D / 32) * 16 + eight / (S::D / 32) * 4 + thread % 4;
    store_shared_64(base + Pairs<S>::STEP + 8 * step, as_word(cosine), as_word(sine));
    for (int k = 0; k < 2; k++) {
      // Without RoPE there are no pairs: any channel may come first.
      const int place = neighbours ? channel[k] % HALF_D : thread, second = neighbours ? channel[k] / HALF_D : k;
      store_shared_16(base + Pairs<S>::MEAN + place / 4 * 16 + place % 4 / 2 * 8 + second * 4 + place % 2 * 2,
                      pack_half2(a.mean[h * S::D + 2 * thread + k], 0.0f));
    }
  }
  return neighbours;
}

// The table of a stage on its way to shared memory. Neighbouring threads write neighbouring columns; the threads after
// them read what follows in the same table.
template <class S, int STAGE>
struct KeyPieces {
  typedef Piece<S::KEY_ENTRY, S::KEY_SPREAD> P;
  static constexpr int COLUMNS = 4 * S::KEY_WAYS, PIECES = COLUMNS * 256 / P::CODES;
  static constexpr int ROUNDS = (PIECES + S::THREADS - 1) / S::THREADS;
  static constexpr int PER_LANE = S::KEY_WAYS * S::KEY_SECTIONS;  // entries
  uint32_t pieces[S::KEY_SECTIONS][ROUNDS][P::WORDS];

  static DEVICE int entry_of(int thread) {
    return thread % COLUMNS / S::KEY_WAYS * PER_LANE + thread % COLUMNS % S::KEY_WAYS;
  }
  DEVICE void load(const Arguments& a, int h, int thread) {
#pragma unroll
    for (int section = 0; section < S::KEY_SECTIONS; section++) {
      const int entry = entry_of(thread) + section * S::KEY_WAYS;
      const int table = (h * S::KEY_GROUPS + entry / S::KEY_SPREAD) * S::KEY_STAGES + STAGE;
      const uint16_t* from = a.key_centroids + table * (256 * S::KEY_DIM) + entry % S::KEY_SPREAD * S::KEY_ENTRY;
#pragma unroll
      for (int j = 0; j < ROUNDS; j++)
        if (thread + j * S::THREADS < PIECES)
          load_piece(from + (thread + j * S::THREADS) / COLUMNS * (P::CODES * S::KEY_DIM), pieces[section][j]);
    }
  }
  DEVICE void store(const Arguments& a, int h, uint32_t base, int thread) {
#pragma unroll
    for (int section = 0; section < S::KEY_SECTIONS; section++) {
      float mean[S::KEY_ENTRY];  // goes with the first stage, so that no token pays for it
      if constexpr (STAGE == 0)
        for (int k = 0; k < S::KEY_ENTRY; k++)
          mean[k] = a.mean[h * S::D + (entry_of(thread) + section * S::KEY_WAYS) * S::KEY_ENTRY + k];
#pragma unroll
      for (int j = 0; j < ROUNDS; j++) {
        const int code = (thread + j * S::THREADS) / COLUMNS * P::CODES;
        uint32_t(&piece)[P::WORDS] = pieces[section][j];
        if (code >= 256) break;
        if constexpr (STAGE == 0)
#pragma unroll
          for (int k = 0; k < P::WORDS; k++)
            piece[k] = pack_half2(half_to_float((uint16_t)piece[k]) + mean[2 * k % S::KEY_ENTRY],
                                  half_to_float((uint16_t)(piece[k] >> 16)) + mean[(2 * k + 1) % S::KEY_ENTRY]);
        if constexpr (S::KEY_ENTRY >= 4)
          for (int k = 0; k < P::WORDS; k += 2) gather_pairs(piece[k], piece[k + 1]);
        store_entries<S::KEY_ENTRY / 2>(base + S::KEY_TABLE + (STAGE * S::KEY_SECTIONS + section) * SECTION +
                                            code * 128 + thread % COLUMNS * (2 * S::KEY_ENTRY),
                                        piece);
      }
    }
  }
};

template <class S, int STAGE>
struct ValuePieces {
  typedef Piece<S::VALUE_ENTRY, S::VALUE_SPREAD> P;
  typedef ValueStage<S, STAGE> At;
  static constexpr int COLUMNS = 2 * S::VALUE_WAYS, PIECES = COLUMNS * 256 / P::CODES;
  static constexpr int ROUNDS = (PIECES + S::THREADS - 1) / S::THREADS, PER_STEP = 8 / S::VALUE_WAYS;  // sections
  uint32_t pieces[S::VALUE_SECTIONS][ROUNDS][P::WORDS];

  DEVICE void load(const Arguments& a, int h, int thread) {
    const int column = thread % COLUMNS;
#pragma unroll
    for (int section = 0; section < S::VALUE_SECTIONS; section++) {
      const int lane = section % PER_STEP * S::VALUE_WAYS + column / 2;
      const int entry = lane * S::VALUE_PER_LANE + section / PER_STEP * 2 + column % 2;
      const int table = (h * S::VALUE_GROUPS + entry / S::VALUE_SPREAD) * S::VALUE_STAGES + STAGE;
      const uint16_t* from =
          a.value_centroids + table * (256 * S::VALUE_DIM) + entry % S::VALUE_SPREAD * S::VALUE_ENTRY;
#pragma unroll
      for (int j = 0; j < ROUNDS; j++)
        if (thread + j * S::THREADS < PIECES)
          load_piece(from + (thread + j * S::THREADS) / COLUMNS * (P::CODES * S::VALUE_DIM), pieces[section][j]);
    }
  }
  DEVICE void store(uint32_t base, int thread) {
#pragma unroll
    for (int section = 0; section < S::VALUE_SECTIONS; section++)
#pragma unroll
      for (int j = 0; j < ROUNDS; j++) {
        const int index = (thread + j * S::THREADS) / COLUMNS, code = index * P::CODES;
        if (code >= 256) break;
        const int row = S::VALUE_TABLE + At::FIRST + (At::ALONE ? section / 2 : section) * SECTION + code * 128;
        for (int copy = 0; copy < (At::TWICE ? 2 : 1); copy++) {
          // Half of the threads begin with the other copy: another column.
          const int table = At::TWICE ? copy ^ (index & 1) : At::ALONE ? section % 2 : STAGE % 2;
          store_entries<S::VALUE_ENTRY / 2>(base + row + (thread % COLUMNS * 2 + table) * (2 * S::VALUE_ENTRY),
                                            pieces[section][j]);
        }
      }
  }
};

// Tables of a kv head into shared memory, from stage `STAGE` on. While the loads of the first are on their way, pairs
// are sorted; returns what `sort_pairs` does.
template <class S, int STAGE = 0>
DEVICE bool fill_tables(const Arguments& a, int h, uint8_t* memory, int thread) {
  const uint32_t base = shared_address(memory);
  KeyPieces<S, STAGE> keys;
  ValuePieces<S, STAGE> values;
  bool neighbours = false;
  if constexpr (STAGE < S::KEY_STAGES) keys.load(a, h, thread);
  if constexpr (STAGE < S::VALUE_STAGES) values.load(a, h, thread);
  if constexpr (STAGE == 0) neighbours = sort_pairs<S>(a, h, base, thread);
  if constexpr (STAGE < S::KEY_STAGES) keys.store(a, h, base, thread);
  if constexpr (STAGE < S::VALUE_STAGES) values.store(base, thread);
  if constexpr (STAGE + 1 < S::KEY_STAGES || STAGE + 1 < S::VALUE_STAGES)
    fill_tables<S, STAGE + 1>(a, h, memory, thread);
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
