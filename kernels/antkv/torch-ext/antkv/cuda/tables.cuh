// A kv head's tables on their way to shared memory, and its RoPE pairs. Copies are asynchronous wherever an entry has at
// least 8 bytes, so that exact tokens, which need no table, are attended meanwhile.

// What a thread takes of a table at a time: codes that follow one another if an entry is a whole code, else one entry.
template <int ENTRY, int SPREAD>
struct Piece {
  static constexpr int CODES = SPREAD == 1 ? 8 / ENTRY : 1, WORDS = ENTRY * CODES / 2;
  static constexpr bool ASYNC = ENTRY >= 4;  // copies of 4 bytes would be four times as many, of as many lines each
};

// (x, y) (x, y) -> (x, x) (y, y), so that two pairs turn at a time.
DEVICE void gather_pairs(uint32_t& first, uint32_t& second) {
  const uint32_t x = permute_bytes(first, second, 0x5410);
  second = permute_bytes(first, second, 0x7632);
  first = x;
}

// Two channels of an entry with their means.
DEVICE uint32_t add_mean(uint32_t entry, float first, float second) {
  return pack_half2(half_to_float((uint16_t)entry) + first, half_to_float((uint16_t)(entry >> 16)) + second);
}

// RoPE pairs in the order in which lanes own them, in shared memory: that of their first channels if every pair is
// (i, i + D/2), so that a lane's channels are neighbours, else the latent one.
template <class S>
struct Pairs {
  static constexpr int FREQUENCY = S::PAIRS, SCALE = FREQUENCY + 2 * S::D, MEAN = SCALE + 2 * S::D;
  static constexpr int CHANNELS = MEAN + 2 * S::D;
  // The same in latent order, in which codes are; means in float32.
  static constexpr int LATENT_FREQUENCY = CHANNELS + S::D, LATENT_SCALE = LATENT_FREQUENCY + 2 * S::D;
  static constexpr int LATENT_MEAN = LATENT_SCALE + 2 * S::D, LATENT_CHANNELS = LATENT_MEAN + 4 * S::D;
};

// A pair on its way from memory: of the first D/2 threads each has one.
template <class S>
struct OwnPair {
  static constexpr int HALF_D = S::D / 2;
  int channel[2] = {0, HALF_D};
  float frequency, scale, mean[2];

  DEVICE void load(const Arguments& a, int h, int thread) {
    if (thread >= HALF_D) return;
    const int pair = h * HALF_D + thread;
    for (int k = 0; k < 2; k++) channel[k] = a.channels[2 * pair + k], mean[k] = a.mean[2 * pair + k];
    frequency = a.frequency[pair], scale = a.pair_scale[pair];
  }
  // Returns whether a lane's channels are neighbours.
  DEVICE bool store(uint32_t base, int thread) const {
    const bool neighbours = !S::ROTATES || all_of_block(channel[1] == channel[0] + HALF_D);
    if (thread >= HALF_D) return neighbours;
    store_shared_float(base + Pairs<S>::LATENT_FREQUENCY + 4 * thread, frequency);
    store_shared_float(base + Pairs<S>::LATENT_SCALE + 4 * thread, scale);
    store_shared_16(base + Pairs<S>::LATENT_CHANNELS + 2 * thread, channel[0] | channel[1] << 8);
    const int at = neighbours ? channel[0] % HALF_D : thread;
    store_shared_float(base + Pairs<S>::FREQUENCY + 4 * at, frequency);
    store_shared_float(base + Pairs<S>::SCALE + 4 * at, scale);
    store_shared_16(base + Pairs<S>::CHANNELS + 2 * at, channel[0] | channel[1] << 8);
    for (int k = 0; k < 2; k++) {
      // Without RoPE there are no pairs: any channel may come first.
      const int place = neighbours ? channel[k] % HALF_D : thread, second = neighbours ? channel[k] / HALF_D : k;
      store_shared_16(base + Pairs<S>::MEAN + place / 4 * 16 + place % 4 / 2 * 8 + second * 4 + place % 2 * 2,
                      pack_half2(mean[k], 0.0f));
      store_shared_float(base + Pairs<S>::LATENT_MEAN + 4 * (2 * thread + k), mean[k]);
    }
    return neighbours;
  }
};

// What a thread brings of the keys' table of a stage. Neighbouring threads write neighbouring columns; the threads after
// them read what follows in the same table. An entry without ASYNC passes through `pieces`.
template <class S, int STAGE>
struct KeyPieces {
  typedef Piece<S::KEY_ENTRY, S::KEY_SPREAD> P;
  static constexpr int COLUMNS = 4 * S::KEY_WAYS, PIECES = COLUMNS * 256 / P::CODES, WORDS = S::KEY_ENTRY / 2;
  static constexpr int ROUNDS = (PIECES + S::THREADS - 1) / S::THREADS;
  uint32_t pieces[P::ASYNC ? 1 : S::KEY_SECTIONS][ROUNDS][P::WORDS];

  static DEVICE int entry_of(int thread, int section) {
    const int column = thread % COLUMNS;
    return column / S::KEY_WAYS * (S::KEY_WAYS * S::KEY_SECTIONS) + column % S::KEY_WAYS + section * S::KEY_WAYS;
  }
  static DEVICE uint32_t place_of(uint32_t base, int thread, int section, int round) {
    return base + S::KEY_TABLE + (STAGE * S::KEY_SECTIONS + section) * SECTION +
           (thread + round * S::THREADS) / COLUMNS * (P::CODES * 128) + thread % COLUMNS * (2 * S::KEY_ENTRY);
  }
  DEVICE void load(const Arguments& a, int h, uint32_t base, int thread) {
#pragma unroll
    for (int section = 0; section < S::KEY_SECTIONS; section++) {
      const int entry = entry_of(thread, section);
      const int table = (h * S::KEY_GROUPS + entry / S::KEY_SPREAD) * S::KEY_STAGES + STAGE;
      const uint16_t* from = a.key_centroids + table * (256 * S::KEY_DIM) + entry % S::KEY_SPREAD * S::KEY_ENTRY;
#pragma unroll
      for (int j = 0; j < ROUNDS; j++) {
        if (thread + j * S::THREADS >= PIECES) break;
        const uint16_t* piece = from + (thread + j * S::THREADS) / COLUMNS * (P::CODES * S::KEY_DIM);
        if constexpr (P::ASYNC)
          for (int k = 0; k < P::CODES; k++)
            copy_async<2 * S::KEY_ENTRY>(place_of(base, thread, section, j) + k * 128, piece + k * S::KEY_DIM);
        else
          load_128(piece, pieces[section][j]);
      }
    }
  }
  // Without ASYNC: entries with their means, so that no token pays for them.
  DEVICE void store(const Arguments& a, int h, uint32_t base, int thread) {
#pragma unroll
    for (int section = 0; section < S::KEY_SECTIONS; section++) {
      const float* mean = a.mean + h * S::D + entry_of(thread, section) * S::KEY_ENTRY;
      const float first = mean[0], second = mean[1];
#pragma unroll
      for (int j = 0; j < ROUNDS; j++)
        if (thread + j * S::THREADS < PIECES)
          for (int k = 0; k < P::CODES; k++)
            store_shared_32(place_of(base, thread, section, j) + k * 128,
                            add_mean(pieces[section][j][k], first, second));
    }
  }
  // With ASYNC: the same, in place, and pairs gathered, of what this thread's copies brought.
  static DEVICE void finish(uint32_t base, int thread) {
#pragma unroll
    for (int section = 0; section < S::KEY_SECTIONS; section++) {
      const uint32_t mean_place = base + Pairs<S>::LATENT_MEAN + entry_of(thread, section) * (4 * S::KEY_ENTRY);
      uint32_t mean[S::KEY_ENTRY];
      if constexpr (STAGE == 0) load_words(mean_place, mean);
#pragma unroll
      for (int j = 0; j < ROUNDS; j++) {
        if (thread + j * S::THREADS >= PIECES) break;
#pragma unroll
        for (int k = 0; k < P::CODES; k++) {
          const uint32_t place = place_of(base, thread, section, j) + k * 128;
          uint32_t entry[WORDS];
          load_words(place, entry);
          if constexpr (STAGE == 0)
#pragma unroll
            for (int i = 0; i < WORDS; i++)
              entry[i] = add_mean(entry[i], as_float(mean[2 * i]), as_float(mean[2 * i + 1]));
#pragma unroll
          for (int i = 0; i < WORDS; i += 2) gather_pairs(entry[i], entry[i + 1]);
          store_words(place, entry);
        }
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
  uint32_t pieces[P::ASYNC ? 1 : S::VALUE_SECTIONS][ROUNDS][P::WORDS];

  static DEVICE uint32_t place_of(uint32_t base, int thread, int section, int round, int copy) {
    const int index = (thread + round * S::THREADS) / COLUMNS;
    // Half of the threads begin with the other copy: another column.
    const int table = At::TWICE ? copy ^ (index & 1) : At::ALONE ? section % 2 : STAGE % 2;
    return base + S::VALUE_TABLE + At::FIRST + (At::ALONE ? section / 2 : section) * SECTION + index * (P::CODES * 128) +
           (thread % COLUMNS * 2 + table) * (2 * S::VALUE_ENTRY);
  }
  DEVICE void load(const Arguments& a, int h, uint32_t base, int thread) {
    const int column = thread % COLUMNS;
#pragma unroll
    for (int section = 0; section < S::VALUE_SECTIONS; section++) {
      const int lane = section % PER_STEP * S::VALUE_WAYS + column / 2;
      const int entry = lane * S::VALUE_PER_LANE + section / PER_STEP * 2 + column % 2;
      const int table = (h * S::VALUE_GROUPS + entry / S::VALUE_SPREAD) * S::VALUE_STAGES + STAGE;
      const uint16_t* from =
          a.value_centroids + table * (256 * S::VALUE_DIM) + entry % S::VALUE_SPREAD * S::VALUE_ENTRY;
#pragma unroll
      for (int j = 0; j < ROUNDS; j++) {
        if (thread + j * S::THREADS >= PIECES) break;
        const uint16_t* piece = from + (thread + j * S::THREADS) / COLUMNS * (P::CODES * S::VALUE_DIM);
        if constexpr (P::ASYNC)
          for (int copy = 0; copy < (At::TWICE ? 2 : 1); copy++)
            for (int k = 0; k < P::CODES; k++)
              copy_async<2 * S::VALUE_ENTRY>(place_of(base, thread, section, j, copy) + k * 128,
                                             piece + k * S::VALUE_DIM);
        else
          load_128(piece, pieces[section][j]);
      }
    }
  }
  DEVICE void store(uint32_t base, int thread) {
#pragma unroll
    for (int section = 0; section < S::VALUE_SECTIONS; section++)
#pragma unroll
      for (int j = 0; j < ROUNDS; j++)
        if (thread + j * S::THREADS < PIECES)
          for (int copy = 0; copy < (At::TWICE ? 2 : 1); copy++)
            for (int k = 0; k < P::CODES; k++)
              store_shared_32(place_of(base, thread, section, j, copy) + k * 128, pieces[section][j][k]);
  }
};

// Asks for the tables of the stages from `STAGE` on, of which entries of 2 channels (one stage) come in registers.
template <class S, int STAGE = 0>
DEVICE void load_tables(const Arguments& a, int h, uint32_t base, int thread, KeyPieces<S, 0>& keys,
                        ValuePieces<S, 0>& values) {
  if constexpr (STAGE == 0) keys.load(a, h, base, thread), values.load(a, h, base, thread);
  if constexpr (STAGE > 0 && STAGE < S::KEY_STAGES) KeyPieces<S, STAGE>().load(a, h, base, thread);
  if constexpr (STAGE > 0 && STAGE < S::VALUE_STAGES) ValuePieces<S, STAGE>().load(a, h, base, thread);
  if constexpr (STAGE + 1 < S::KEY_STAGES || STAGE + 1 < S::VALUE_STAGES)
    load_tables<S, STAGE + 1>(a, h, base, thread, keys, values);
}

// Begins to fill the tables of a kv head, and has its pairs in shared memory after the block's next barrier. Returns
// whether a lane's channels are neighbours. Whoever reads the tables first calls `finish_tables`.
template <class S>
DEVICE bool begin_tables(const Arguments& a, int h, uint32_t base, int thread) {
  OwnPair<S> pair;
  KeyPieces<S, 0> keys;
  ValuePieces<S, 0> values;
  pair.load(a, h, thread);
  load_tables<S>(a, h, base, thread, keys, values);
  const bool neighbours = pair.store(base, thread);
  if constexpr (!KeyPieces<S, 0>::P::ASYNC) keys.store(a, h, base, thread);
  if constexpr (!ValuePieces<S, 0>::P::ASYNC) values.store(base, thread);
  return neighbours;
}

template <class S, int STAGE = 0>
DEVICE void finish_keys(uint32_t base, int thread) {
  if constexpr (KeyPieces<S, STAGE>::P::ASYNC) KeyPieces<S, STAGE>::finish(base, thread);
  if constexpr (STAGE + 1 < S::KEY_STAGES) finish_keys<S, STAGE + 1>(base, thread);
}

// Waits for the tables; all threads of the block take part.
template <class S>
DEVICE void finish_tables(uint32_t base, int thread) {
  wait_for_copies();
  finish_keys<S>(settled(base), (int)settled(thread));  // places found anew: kept, they would fill registers
  sync_block();
}
