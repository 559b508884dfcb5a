// Attention of a few queries over packed codes: centroids are gathered from shared memory straight into the fragments
// of tensor-core products.
//
// A product of 16 tokens (rows) takes a token's channels from four lanes, in any order, as long as the query's are in
// the same. So a lane owns a quarter of a token's entries and reads them by itself, 16, 8 or 4 bytes at a time. Codes are
// random, so an entry owns a column of shared memory, and lanes that are served together must read different columns:
// - Keys: the four lanes of a token have different entries; tokens that are served together take their entries in
//   another order each: in step w token r reads entry w ^ r. What that puts out of order within 8 channels is exchanged
//   between registers. The last bit, which exchanges 8 channels with 8 others, costs nothing: up to four query rows fill
//   half of a product's columns, and the other half has the query's channels in that order. Of a lane's two tokens one
//   is in the order of its columns; the lane two further has the other's logits, and they exchange probabilities.
// - Values: products have channels as rows and query rows as columns; a lane reads its entries for four tokens. Of the
//   four lanes that share entries two read a second copy, and two read the entries of a pair in the other order: with
//   up to four query rows the other half of the columns is for those, with more they are exchanged.
// Of several stages the entries are added. Keys' stages are read one after the other. Values' go two by two: the tables
// of two stages stand where copies would, half of the lanes read the second first, and neither needs a copy. A third
// has two again, or one where two do not fit: then two lanes meet in a column.
// Keys are coded before RoPE: a warp always takes the same 16 tokens of a span of 16 * TEAM_WARPS, whose angles never
// change, and the query is turned to the start of each span once for the whole team.

// What every lane keeps of the online softmax over codes, for the query rows of its two columns.
template <class S>
struct CodeSums {
  float maximum[2], total[2];
  float out[S::D / 32 * S::GROUPS][4];  // 16 channels x 8 columns each
};

// Two pairs of a query's row from `pair` on, times the scales, turned back by the angles of `position`;
// zeros for rows that are not there.
template <class S>
DEVICE void turn_back(const Arguments& a, int b, int h, int row, int pair, int position, float (&x)[2], float (&y)[2]) {
  for (int k = 0; k < 2; k++) x[k] = y[k] = 0.0f;
  if (row >= a.group * a.q_len) return;
  const uint16_t* q = query_of_row(a, b, h, row);
  pair += h * (S::D / 2);
#pragma unroll
  for (int k = 0; k < 2; k++) {
    x[k] = load_16(q + a.channels[2 * (pair + k)], a.query_is_bfloat) * a.scale_log2;
    y[k] = load_16(q + a.channels[2 * (pair + k) + 1], a.query_is_bfloat) * a.scale_log2;
    if (S::ROTATES) {
      x[k] *= a.pair_scale[pair + k], y[k] *= a.pair_scale[pair + k];
      float sine, cosine;
      sin_cos((float)position * a.frequency[pair + k], sine, cosine);
      const float turned = x[k] * cosine + y[k] * sine;
      y[k] = y[k] * cosine - x[k] * sine;
      x[k] = turned;
    }
  }
}

// Queries in latent order for the spans first, first + SPAN, ... before `last`: ``R(-(first - offset) frequency) q``
// times the scales, as [span][8 channels of a lane][query row][lane] of float16, pairs as the keys' tables have them.
// Teams turn on from where the spans before ended, unless `anew`: they turn a few spans at a time.
template <class S>
DEVICE void turn_queries(const Arguments& a, int b, int h, int first, int last, int offset, bool anew, uint32_t to,
                         const Team<S>& team) {
  constexpr int ITEMS = S::ROWS * S::D / 4, PARALLEL = S::TEAM_THREADS / ITEMS;  // items: two pairs of a row
  constexpr int CHUNKS = S::KEEPS_TURNED || PARALLEL < 2 ? 1 : PARALLEL < 4 ? 2 : 4;
  constexpr int SPANS = (S::AHEAD + CHUNKS - 1) / CHUNKS;
#pragma unroll
  for (uint32_t round = 0; round < ITEMS * CHUNKS; round += S::TEAM_THREADS) {
    const uint32_t i = round + settled(team.thread);  // places are computed here: registers are for the sums
    if (ITEMS * CHUNKS % S::TEAM_THREADS && i >= ITEMS * CHUNKS) break;
    const uint32_t item = CHUNKS == 1 ? i : i % ITEMS, eight = item / 2 % 4 * (S::D / 32) + item / (8 * S::ROWS);
    const int span = CHUNKS == 1 ? 0 : i / ITEMS * SPANS;
    const uint32_t kept = team.work + S::TURNED + item * 16;
    float x[2], y[2];
    uint32_t step[4];  // cosine and sine of either pair
    if (!S::KEEPS_TURNED || anew) {
      turn_back<S>(a, b, h, item / 8 % S::ROWS, eight * 4 + item % 2 * 2, first + span * S::SPAN - offset, x, y);
    } else {
      uint32_t words[4];
      load_shared_128(kept, words);
      for (int k = 0; k < 2; k++) x[k] = as_float(words[k]), y[k] = as_float(words[2 + k]);
    }
    if (S::ROTATES) load_shared_128(team.base + S::SPAN_ANGLES + (item / (8 * S::ROWS) * 8 + item % 8) * 16, step);
    // Beyond `last` there is room, and no loop if all are turned.
    const int left = (last - first + S::SPAN - 1) / S::SPAN - span;
    const int spans = S::KEEPS_TURNED ? S::AHEAD : smaller(smaller(SPANS, S::AHEAD - span), left);
    for (int s = 0; s < spans; s++) {
      store_shared_64(to + (span + s) * S::QUERY_BYTES + item * 8, pack_half2(x[0], x[1]), pack_half2(y[0], y[1]));
      if (S::ROTATES)
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const float cosine = as_float(step[2 * k]), sine = as_float(step[2 * k + 1]);
          const float turned = x[k] * cosine + y[k] * sine;
          y[k] = y[k] * cosine - x[k] * sine;
          x[k] = turned;
        }
    }
    if constexpr (S::KEEPS_TURNED) {
      uint32_t words[4] = {as_word(x[0]), as_word(x[1]), as_word(y[0]), as_word(y[1])};
      store_shared_128(kept, words);
    }
  }
}

DEVICE void exchange(bool yes, uint32_t& p, uint32_t& q) {
  const uint32_t before = p;
  p = yes ? q : p;
  q = yes ? before : q;
}

// The 8 channels `half` of a section of a lane's entries of a token, summed from stage `STAGE` on. Sums of float16 are
// good enough: the product takes the key in float16, and a sum is rounded as that key would be.
template <class S, int SECTION_, int HALF, int STAGE = 0>
DEVICE void gather_key(const uint32_t (&codes)[S::KEY_WORDS], const uint32_t (&place)[S::KEY_WAYS],
                       uint32_t (&key)[4]) {
  constexpr int WORDS = S::KEY_ENTRY / 2, OFFSET = (STAGE * S::KEY_SECTIONS + SECTION_) * SECTION;
#pragma unroll
  for (int i = 0; i < 4 / WORDS; i++) {
    const int way = HALF * (4 / WORDS) + i, code = (SECTION_ * S::KEY_WAYS + way) / S::KEY_SPREAD;
    const int byte = code * S::Key::STRIDE + STAGE;
    uint32_t entry[WORDS];
    load_settled<OFFSET>(times_128_plus(codes[byte / 4], byte % 4, place[way]), entry);
#pragma unroll
    for (int k = 0; k < WORDS; k++) key[i * WORDS + k] = entry[k];
  }
  if constexpr (STAGE + 1 < S::KEY_STAGES) {
    uint32_t rest[4];
    gather_key<S, SECTION_, HALF, STAGE + 1>(codes, place, rest);
#pragma unroll
    for (int k = 0; k < 4; k++) key[k] = add_half2(key[k], rest[k]);
  }
}

// Adds the logits of tokens g and g + 8 of the warp's tile, two columns each: ``logits[2 i + k]`` for token g + 8 i.
// With up to four query rows token g + 8 takes the 8 channels of a step that token g has in the other one.
template <class S, int SECTION_>
DEVICE void section_logits(const uint32_t (&codes)[2][S::KEY_WORDS], const uint32_t (&place)[S::KEY_WAYS],
                           const uint32_t (&angles)[2][2][4], const uint32_t (&query_place)[2], uint32_t query_offset,
                           int g, float (&logits)[4]) {
  constexpr int FLIP = S::GROUPS == 1;
  uint32_t key[2][2][4];  // [step][token][words]
  gather_key<S, SECTION_, 0>(codes[0], place, key[0][0]);
  gather_key<S, SECTION_, 1>(codes[0], place, key[1][0]);
  gather_key<S, SECTION_, FLIP>(codes[1], place, key[0][1]);
  gather_key<S, SECTION_, 1 - FLIP>(codes[1], place, key[1][1]);
#pragma unroll
  for (int token = 0; token < 2; token++) {
#pragma unroll
    for (int step = 0; step < 2; step++) {
      uint32_t(&k)[4] = key[step][token];
      if (S::KEY_ENTRY == 4) exchange(g & 1, k[0], k[2]), exchange(g & 1, k[1], k[3]);
      if (S::KEY_ENTRY == 2) {
        exchange(g & 1, k[0], k[1]), exchange(g & 1, k[2], k[3]);
        exchange(g & 2, k[0], k[2]), exchange(g & 2, k[1], k[3]);
        gather_pairs(k[0], k[1]), gather_pairs(k[2], k[3]);
      }
    }
    if (S::GROUPS == 2)
      for (int i = 0; i < 4; i++) exchange(g & (S::KEY_WAYS / 2), key[0][token][i], key[1][token][i]);
  }
#pragma unroll
  for (int step = 0; step < 2; step++) {
    uint32_t query[4];
    load_shared_128(query_place[step] + query_offset + SECTION_ * (2 * S::ROWS * 64), query);
    uint32_t(&k)[2][4] = key[step];
    if (S::ROTATES)
#pragma unroll
      for (int token = 0; token < 2; token++)
#pragma unroll
        for (int i = 0; i < 4; i += 2)
          turn(k[token][i], k[token][i + 1], angles[step][token][i], angles[step][token][i + 1]);
    multiply_add(logits, k[0][0], k[1][0], k[0][1], k[1][1], query[0], query[1]);
    multiply_add(logits, k[0][2], k[1][2], k[0][3], k[1][3], query[2], query[3]);
  }
}

// Entry `z` of a pair of a token, summed from stage `STAGE` on, in float16 as keys are: a product for each stage would
// take more instructions.
template <class S, int STEP, int STAGE = 0>
DEVICE void gather_value(const uint32_t (&codes)[S::VALUE_WORDS], const uint32_t (&place)[S::VALUE_PLACES][2], int z,
                         int token, uint32_t (&value)[S::VALUE_ENTRY / 2]) {
  typedef ValueStage<S, STAGE> At;
  constexpr int FIRST = STEP * (8 / S::VALUE_WAYS);  // section
  constexpr int ALONE = FIRST / 2 * SECTION + FIRST % 2 * (2 * S::VALUE_ENTRY);
  const int byte = token * S::VALUE_BYTES + (2 * STEP + z) / S::VALUE_SPREAD * S::Value::STRIDE + STAGE;
  load_settled<At::FIRST + (At::ALONE ? ALONE : FIRST * SECTION)>(
      times_128_plus(codes[byte / 4], byte % 4, place[At::PLACE][z]), value);
  if constexpr (STAGE + 1 < S::VALUE_STAGES) {
    uint32_t rest[S::VALUE_ENTRY / 2];
    gather_value<S, STEP, STAGE + 1>(codes, place, z, token, rest);
#pragma unroll
    for (int i = 0; i < S::VALUE_ENTRY / 2; i++) value[i] = add_half2(value[i], rest[i]);
  }
}

// Adds the values of a tile, of which a lane names the codes and has the probabilities of its tokens and column; `kept`
// says whether they are for the first or for the second entries of pairs.
template <class S, int STEP>
DEVICE void add_values(const uint32_t (&codes)[S::VALUE_WORDS], const uint32_t (&place)[S::VALUE_PLACES][2],
                       const uint32_t (&prob)[2], bool kept, int c, float (&out)[S::D / 32 * S::GROUPS][4]) {
  constexpr int WORDS = S::VALUE_ENTRY / 2;
  uint32_t value[2][4][WORDS];
#pragma unroll
  for (int z = 0; z < 2; z++)
#pragma unroll
    for (int token = 0; token < 4; token++) gather_value<S, STEP>(codes, place, z, token, value[z][token]);
  if (S::GROUPS == 2)
#pragma unroll
    for (int token = 0; token < 4; token++)
      for (int i = 0; i < WORDS; i++) exchange(c & 1, value[0][token][i], value[1][token][i]);
#pragma unroll
  for (int z = 0; z < 2; z++) {
    const bool all = S::GROUPS == 2 || kept == (z == 0);
    const uint32_t low = all ? prob[0] : 0u, high = all ? prob[1] : 0u;
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      uint32_t(&v)[4][WORDS] = value[z];
      multiply_add(out[(S::GROUPS == 1 ? STEP : 2 * STEP + z) * WORDS + i], permute_bytes(v[0][i], v[1][i], 0x5410),
                   permute_bytes(v[0][i], v[1][i], 0x7632), permute_bytes(v[2][i], v[3][i], 0x5410),
                   permute_bytes(v[2][i], v[3][i], 0x7632), low, high);
    }
  }
}

template <class S>
DEVICE void add_tile(const uint32_t (&codes)[S::VALUE_WORDS], const uint32_t (&place)[S::VALUE_PLACES][2],
                     const uint32_t (&prob)[2], bool kept, int c, float (&out)[S::D / 32 * S::GROUPS][4]) {
  add_values<S, 0>(codes, place, prob, kept, c, out);
  if constexpr (S::VALUE_STEPS > 1) add_values<S, 1>(codes, place, prob, kept, c, out);
  if constexpr (S::VALUE_STEPS > 2) add_values<S, 2>(codes, place, prob, kept, c, out);
  if constexpr (S::VALUE_STEPS > 3) add_values<S, 3>(codes, place, prob, kept, c, out);
}

// From a lane's probabilities, of one token of two columns or with more than four rows of two tokens, to those of its
// values: tokens 2c + 8k and the next, column g.
template <class S>
DEVICE void spread_probabilities(const float (&p)[S::CHOSEN], bool second, uint32_t (&prob)[2]) {
  uint32_t of_token[2] = {pack_half2(p[0], p[1])};
  if constexpr (S::GROUPS == 1) {
    const uint32_t mine = of_token[0], other = shuffle_xor(mine, 2);
    of_token[0] = second ? other : mine, of_token[1] = second ? mine : other;
  } else {
    of_token[1] = pack_half2(p[2], p[3]);
  }
#pragma unroll
  for (int k = 0; k < 2; k++) prob[k] = transpose_matrix(of_token[k]);
}

// Adds the coded tokens first..last-1 of (b, h); `first` is a multiple of 16. All warps of the team take part.
template <class S>
DEVICE void attend_codes(const Arguments& a, int b, int h, int first, int last, const Team<S>& team,
                         CodeSums<S>& sums) {
  const int warp = team.warp(), lane = team.lane(), g = lane / 4, c = lane % 4;
  const uint32_t base = team.base;
  const int64_t bh = (int64_t)b * a.heads + h;
  const int offset = (int)a.offset[b];
  const int lowest = a.hides_padding ? offset : 0;
  const int key_order = g % S::KEY_WAYS, other_half = S::GROUPS == 1 ? key_order / (S::KEY_WAYS / 2) : 0;
  const bool second = S::GROUPS == 1 && c / 2 != other_half;  // which token's logits are in the columns' order

  // Cosines and sines of the keys' pairs of rows g and g + 8, for the channels that the lane holds in each step.
  uint32_t angles[S::KEY_SECTIONS][2][2][4];
  if (S::ROTATES) {
#pragma unroll
    for (int i = 0; i < S::KEY_SECTIONS * 2; i++)
#pragma unroll
      for (int token = 0; token < 2; token++) {
        const int half = i ^ other_half ^ (S::GROUPS == 1 ? token : 0);
        const int pair = h * (S::D / 2) + (c * (S::D / 32) + half) * 4;
#pragma unroll
        for (int two = 0; two < 2; two++) {
          float sine[2], cosine[2];
#pragma unroll
          for (int k = 0; k < 2; k++)
            sin_cos((float)(warp * 16 + g + token * 8) * a.frequency[pair + two * 2 + k], sine[k], cosine[k]);
          angles[i / 2][i % 2][token][two * 2] = pack_half2(cosine[0], cosine[1]);
          angles[i / 2][i % 2][token][two * 2 + 1] = pack_half2(sine[0], sine[1]);
        }
      }
  }
  uint32_t key_place[S::KEY_WAYS], value_place[S::VALUE_PLACES][2], query_place[2];
#pragma unroll
  for (int way = 0; way < S::KEY_WAYS; way++)
    key_place[way] = base + S::KEY_TABLE + (c * S::KEY_WAYS + (way ^ key_order)) * (2 * S::KEY_ENTRY);
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const int column = (g % S::VALUE_WAYS * 2 + (k ^ (c & 1))) * 2, section = g / S::VALUE_WAYS;
#pragma unroll
    for (int i = 0; i < S::VALUE_PLACES; i++)
      value_place[i][k] = base + S::VALUE_TABLE + section * SECTION + (column + (c / 2 ^ i)) * (2 * S::VALUE_ENTRY);
    if constexpr (S::VALUE_TABLES % 2 == 1)
      value_place[S::VALUE_PLACES - 1][k] =
          base + S::VALUE_TABLE + section / 2 * SECTION + (column + section % 2) * (2 * S::VALUE_ENTRY);
    const int of_column = S::GROUPS == 1 ? g / 4 : 0;  // with up to four rows: which of the two orders it has
    query_place[k] = team.work + ((k ^ of_column) * S::ROWS + g % S::ROWS) * 64 + c * 16;
  }
  const bool kept = g / 4 == (c & 1);

  int tile = first + warp * 16;
  NextTiles<S> next(a, bh, tile, g, c, second);
  if (tile < last) next.load(a.capacity - tile, g, c, second);
  wait_for_copy(team.base + S::ARRIVALS);  // the tables, which nothing above needed
#pragma unroll
  for (int way = 0; way < S::KEY_WAYS; way++) key_place[way] = settled(key_place[way]);
#pragma unroll
  for (int i = 0; i < 2 * S::VALUE_PLACES; i++) value_place[i / 2][i % 2] = settled(value_place[i / 2][i % 2]);
  constexpr int TILES = S::TILES;
  for (int start = first, turns = 0; start < last; start += S::AHEAD * S::SPAN, turns++) {
    uint32_t query_offset = S::AHEAD * S::QUERY_BYTES * (turns % 2);
    const bool anew = turns % TURNS_OF_A_QUERY == 0;
    turn_queries<S>(a, b, h, start, last, offset, anew, team.work + query_offset, team);
    team.sync();  // two buffers: nobody writes one before everybody has passed the barrier after reading it
#pragma unroll 1
    for (int span = 0; span < S::AHEAD && tile < last; span += TILES, tile += TILES * S::SPAN) {
      uint32_t key[TILES][2][S::KEY_WORDS], value[TILES][S::VALUE_WORDS], hidden[TILES][S::GROUPS];
#pragma unroll
      for (int i = 0; i < TILES; i++) {
        for (int k = 0; k < 2; k++) order_key<S>(next.tile[i].key[k], g, c, key[i][k]);
        order_values<S>(next.tile[i].value, g, c, value[i]);
        for (int k = 0; k < S::GROUPS; k++) hidden[i][k] = next.tile[i].hidden[k];
      }
      next.load(a.capacity - (tile + TILES * S::SPAN), g, c, second);

      float logits[TILES][4] = {}, chosen[TILES][S::CHOSEN];
#pragma unroll
      for (int i = 0; i < TILES; i++)
        section_logits<S, 0>(key[i], key_place, angles[0], query_place, query_offset + i * S::QUERY_BYTES, g,
                             logits[i]);
      if constexpr (S::KEY_SECTIONS > 1)
#pragma unroll
        for (int i = 0; i < TILES; i++)
          section_logits<S, 1>(key[i], key_place, angles[1], query_place, query_offset + i * S::QUERY_BYTES, g,
                               logits[i]);
      query_offset += TILES * S::QUERY_BYTES;
#pragma unroll
      for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int k = 0; k < S::CHOSEN; k += 2) {
          const int token = g + (second ? 8 : k / 2 * 8), position = tile + i * S::SPAN + token;
          const bool seen = position < last && position >= lowest && !(hidden[i][k / 2] >> g & 1u);
          for (int j = k; j < k + 2; j++) {
            float logit = S::GROUPS == 1 && second ? logits[i][j + 2] : logits[i][j];
            if (S::SOFTCAP) logit = a.softcap_log2 * tanh_of(logit / a.softcap_log2);
            chosen[i][j] = seen ? logit : minus_infinity();
          }
        }
      // Softmax of the query rows of two columns. The maximum is raised only when it must be.
      float peak[2];
      for (int k = 0; k < 2; k++) {
        peak[k] = chosen[0][k];
        for (int i = 1; i < TILES * S::GROUPS; i++)
          peak[k] = largest(peak[k], chosen[i / S::GROUPS][i % S::GROUPS * 2 + k]);
      }
      raise_maximum<S::ROW_LANES>(peak, sums.maximum, sums.total, sums.out);
#pragma unroll
      for (int i = 0; i < TILES; i++) {
        float p[S::CHOSEN];
#pragma unroll
        for (int k = 0; k < S::CHOSEN; k++) {
          p[k] = exp2_fast(chosen[i][k] - sums.maximum[k % 2]);
          sums.total[k % 2] += p[k];
        }
        uint32_t prob[2];
        spread_probabilities<S>(p, second, prob);
        add_tile<S>(value[i], value_place, prob, kept, c, sums.out);
      }
    }
  }
}
