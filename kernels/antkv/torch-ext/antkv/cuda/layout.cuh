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
  const uint8_t* tables;    // (kv_heads, Shape::IMAGE): what a block's shared memory begins with, see table_image.py
  const int* channels;      // (kv_heads, head_dim): plain channel of a latent one
  const float* frequency;   // (kv_heads, head_dim / 2)
  const float* pair_scale;  // (kv_heads, head_dim / 2)
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
  float* tail_logits;  // (batch, kv_heads, tail_capacity, Shape::ROWS) in units of log 2: null, or where they are kept
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
  // Tiles that a warp has under way together, since one alone waits for its reads and products; as Shape.tiles of
  // cuda_shape.py has it. More do not fit the registers, nor do two with heads of 128 and more than one stage, keys of
  // fewer than 8 channels or a softcap, or before sm_90, where addresses take more of them. Three stages are slower so.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  static constexpr int TILES = 1;
#else
  static constexpr bool FITS = D == 64 ? KEY_DIM > 2 && VALUE_DIM > 2 && KEY_STAGES < 3 && VALUE_STAGES < 3
                                       : KEY_DIM > 4 && VALUE_DIM > 2 && KEY_STAGES * VALUE_STAGES == 1 && !SOFTCAP;
  static constexpr int TILES = FITS && AHEAD % 2 == 0 ? 2 : 1;
#endif
  static constexpr int CHOSEN = 2 * GROUPS;  // logits of a tile that a lane has in the order of its columns
  // Lanes that have logits of the same query row over codes are so far apart, twice as far, ...
  static constexpr int ROW_LANES = GROUPS == 1 ? 2 : 4;
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
  // The image of the tables ends; after it, whether they have arrived, and cosine and sine of a span's angles, in the
  // order of `turn_queries`.
  static constexpr int IMAGE = PAIRS + 7 * D + 16, ARRIVALS = IMAGE, SPAN_ANGLES = ARRIVALS + 16;
  // What a team has of its own: queries, whose place its warps' sums take.
  static constexpr int WORK = SPAN_ANGLES + 4 * D, TURNED = 2 * AHEAD * QUERY_BYTES, SUMS = 2 * TEAM_WARPS * ROWS * 4;
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
  static constexpr int FIRST = STAGE / 2 * S::VALUE_SECTIONS * SECTION;  // from VALUE_TABLE on
  static constexpr int PLACE = ALONE ? S::VALUE_PLACES - 1 : STAGE % 2;  // of VALUE_PLACES
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

// RoPE pairs in the order in which lanes own them, in shared memory: that of their first channels if every pair is
// (i, i + D/2), so that a lane's channels are neighbours, else the latent one.
template <class S>
struct Pairs {
  static constexpr int FREQUENCY = S::PAIRS, SCALE = FREQUENCY + 2 * S::D, MEAN = SCALE + 2 * S::D;
  static constexpr int CHANNELS = MEAN + 2 * S::D, NEIGHBOURS = CHANNELS + S::D;
};

// What a block looks up for each share, next to each other: kept in registers it would make others spill.
template <class S>
struct Lengths {
  bool neighbours;
  int coded, tail, anchors;

  DEVICE explicit Lengths(uint32_t base) {
    uint32_t words[4];
    load_shared_128(base + Pairs<S>::NEIGHBOURS, words);
    neighbours = words[0] != 0;
    coded = (int)words[1], tail = (int)words[2], anchors = (int)words[3];
  }
};

// Brings pairs and a span's angles to shared memory, and sends for the tables. The last time that the whole block
// waits: from here on every team waits for itself alone.
template <class S>
DEVICE void begin_block(const Arguments& a, int h, uint32_t base, int thread) {
  const uint8_t* image = a.tables + h * (int64_t)S::IMAGE;
  const int at = S::PAIRS + 16 * (thread - 32);  // the first warp has the copies to begin
  if (at >= S::PAIRS && at < S::IMAGE) {
    uint32_t words[4];
    load_128(image + at, words);
    if (at == Pairs<S>::NEIGHBOURS) {  // after it, lengths: see `Lengths`
      words[1] = a.lengths ? a.lengths[0] : a.coded, words[2] = a.lengths ? a.lengths[1] : a.tail;
      words[3] = a.lengths ? a.lengths[2] : a.anchors;
    }
    store_shared_128(base + at, words);
  }
  const int pair = thread - (S::THREADS - S::D / 2);  // other warps
  if (S::ROTATES && pair >= 0) {
    float sine, cosine;
    sin_cos((float)S::SPAN * a.frequency[h * (S::D / 2) + pair], sine, cosine);
    const int eight = pair / 4, place = eight % (S::D / 32) * 16 + eight / (S::D / 32) * 4 + pair % 4;
    store_shared_64(base + S::SPAN_ANGLES + 8 * place, as_word(cosine), as_word(sine));
  }
  copy_to_shared<S::PAIRS, S::THREADS>(base, image, base + S::ARRIVALS, thread);
}

// Raises the maxima of a lane's two columns if one of `peak`, of its logits, is far above, and scales what was summed
// under them. The lanes of a query row, which are FIRST_LANE, twice FIRST_LANE, ... apart, keep the same maximum.
template <int FIRST_LANE, int COUNT>
DEVICE void raise_maximum(float (&peak)[2], float (&maximum)[2], float (&total)[2], float (&out)[COUNT][4]) {
  if (!any_lane(peak[0] > maximum[0] + 8.0f || peak[1] > maximum[1] + 8.0f)) return;
  for (int k = 0; k < 2; k++) {
    for (int lanes = FIRST_LANE; lanes < 32; lanes *= 2) peak[k] = largest(peak[k], shuffle_xor(peak[k], lanes));
    const float raised = largest(maximum[k], peak[k]), decay = exp2_fast(maximum[k] - raised);
    maximum[k] = raised;
    total[k] *= decay;
    for (int i = 0; i < COUNT; i++) out[i][k] *= decay, out[i][2 + k] *= decay;
  }
}
