// Attention of a few queries over exact tokens: anchors, sinks and the window. They are few, so plain arithmetic will
// do: 16 lanes share a token, each with some RoPE pairs of its key and some channels of its value.

template <class S>
struct ExactSums {
  float maximum[S::ROWS], total[S::ROWS], out[S::ROWS][S::D / 16];
};

enum Kind { INT8, HALF, BFLOAT };

DEVICE float load_element(const void* p, int64_t i, Kind kind) {
  if (kind == INT8) return (float)((const int8_t*)p)[i];
  const uint16_t x = ((const uint16_t*)p)[i];
  return kind == HALF ? half_to_float(x) : bfloat_to_float(x);
}

// COUNT (4 or 8) neighbours from element `i` on, a multiple of COUNT.
template <Kind KIND, int COUNT>
DEVICE void load_elements(const void* p, int64_t i, float (&out)[COUNT]) {
  uint32_t words[4];
  if (KIND == INT8) {
    const int8_t* at = (const int8_t*)p + i;
    if constexpr (COUNT == 8) {
      uint32_t two[2];
      load_64(at, two);
      words[0] = two[0], words[1] = two[1];
    } else {
      words[0] = load_32(at);
    }
#pragma unroll
    for (int k = 0; k < COUNT; k++) out[k] = (float)(int8_t)(words[k / 4] >> (8 * (k % 4)));
  } else {
    const uint16_t* at = (const uint16_t*)p + i;
    if constexpr (COUNT == 8) {
      load_128(at, words);
    } else {
      uint32_t two[2];
      load_64(at, two);
      words[0] = two[0], words[1] = two[1];
    }
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
      const uint16_t x = (uint16_t)(words[k / 2] >> (16 * (k % 2)));
      out[k] = KIND == HALF ? half_to_float(x) : bfloat_to_float(x);
    }
  }
}

// What a lane knows of its pairs e, e + 16, ...: their channels, how keys turn, and the queries times scale and log2(e).
template <class S>
struct LanePairs {
  static constexpr int PAIRS = S::D / 32;
  int channel_x[PAIRS], channel_y[PAIRS];
  float mean_x[PAIRS], mean_y[PAIRS], frequency[PAIRS], scale[PAIRS];
  float query_x[S::ROWS][PAIRS], query_y[S::ROWS][PAIRS];
};

template <class S>
DEVICE void load_pairs(const Arguments& a, int h, int e, LanePairs<S>& pairs) {
#pragma unroll
  for (int i = 0; i < S::D / 32; i++) {
    const int pair = e + 16 * i, at = h * S::D + 2 * pair;
    pairs.channel_x[i] = a.channels[at];
    pairs.channel_y[i] = a.channels[at + 1];
    pairs.mean_x[i] = a.mean[at];
    pairs.mean_y[i] = a.mean[at + 1];
    pairs.frequency[i] = a.frequency[h * (S::D / 2) + pair];
    pairs.scale[i] = a.pair_scale[h * (S::D / 2) + pair];
  }
}

template <class S>
DEVICE void load_query(const Arguments& a, int b, int h, LanePairs<S>& pairs) {
#pragma unroll
  for (int row = 0; row < S::ROWS; row++) {
    const bool exists = row < a.group * a.q_len;
    const uint16_t* q = a.query + b * a.query_stride_b +
                        (int64_t)(h * a.group + (exists ? row / a.q_len : 0)) * a.query_stride_h +
                        (exists ? row % a.q_len : 0) * a.query_stride_n;
#pragma unroll
    for (int i = 0; i < S::D / 32; i++) {
      pairs.query_x[row][i] = exists ? load_16(q + pairs.channel_x[i], a.query_is_bfloat) * a.scale_log2 : 0.0f;
      pairs.query_y[row][i] = exists ? load_16(q + pairs.channel_y[i], a.query_is_bfloat) * a.scale_log2 : 0.0f;
    }
  }
}

// Adds the tokens first..last-1 of a set. Without positions they are consecutive from `first_position` on.
// INT8 keys are before RoPE, less their mean; others after it.
template <class S, Kind KIND>
DEVICE void attend_exact(const Arguments& a, int b, int h, int first, int last, int rows_in_buffer,
                         const int* positions, const void* keys, const void* values, const uint16_t* key_scale,
                         const uint16_t* value_scale, int first_position, int length, int thread,
                         const LanePairs<S>& pairs, ExactSums<S>& sums) {
  constexpr int PAIRS = S::D / 32, CHANNELS = S::D / 16, AT_ONCE = 2;
  const int lane = thread % 32, e = lane % 16;
  const int offset = (int)a.offset[b], lowest = a.hides_padding ? offset : 0;
  const int64_t start = ((int64_t)b * a.heads + h) * rows_in_buffer;
  // A warp stays together: its lanes shuffle.
  for (int base = first + thread / 32 * (2 * AT_ONCE); base < last; base += S::THREADS / 16 * AT_ONCE) {
    // Rows are far away: lanes 0 to 3 of a token's ask for those of the next rounds.
    const int ahead = base + 2 * (S::THREADS / 16 * AT_ONCE) + 2 * (e % 2) + lane / 16;
    if (e < 4 && ahead < last) {
      const int64_t at = (start + ahead) * S::D * (KIND == INT8 ? 1 : 2);
      ask_for((const uint8_t*)(e < 2 ? keys : values) + at);
    }
    float dot[AT_ONCE][S::ROWS], value[AT_ONCE][CHANNELS];
    int position[AT_ONCE];
    bool exists[AT_ONCE];
#pragma unroll
    for (int t = 0; t < AT_ONCE; t++) {
      const int n = base + 2 * t + lane / 16;
      exists[t] = n < last;
      const int64_t row = start + (exists[t] ? n : first);
      position[t] = positions ? positions[row] : first_position + n;
      exists[t] = exists[t] && position[t] >= lowest;
      const float scale = KIND == INT8 ? half_to_float(key_scale[row]) : 1.0f;
      const float value_size = KIND == INT8 ? half_to_float(value_scale[row]) : 1.0f;
#pragma unroll
      for (int r = 0; r < S::ROWS; r++) dot[t][r] = 0.0f;
#pragma unroll
      for (int i = 0; i < PAIRS; i++) {
        float x = load_element(keys, row * S::D + pairs.channel_x[i], KIND);
        float y = load_element(keys, row * S::D + pairs.channel_y[i], KIND);
        if (KIND == INT8) {
          x = x * scale + pairs.mean_x[i];
          y = y * scale + pairs.mean_y[i];
          if (S::ROTATES) {
            float sine, cosine;
            sin_cos((float)(position[t] - offset) * pairs.frequency[i], sine, cosine);
            const float turned = (x * cosine - y * sine) * pairs.scale[i];
            y = (y * cosine + x * sine) * pairs.scale[i];
            x = turned;
          }
        }
#pragma unroll
        for (int r = 0; r < S::ROWS; r++) dot[t][r] += pairs.query_x[r][i] * x + pairs.query_y[r][i] * y;
      }
      load_elements<KIND, CHANNELS>(values, row * S::D + e * CHANNELS, value[t]);
#pragma unroll
      for (int i = 0; i < CHANNELS; i++) value[t][i] *= value_size;
    }
#pragma unroll
    for (int r = 0; r < S::ROWS; r++) {
      const int last_seen = a.causal ? length - a.q_len + r % a.q_len : length - 1;
      float raised = sums.maximum[r];
#pragma unroll
      for (int t = 0; t < AT_ONCE; t++) {
        for (int lanes = 1; lanes < 16; lanes *= 2) dot[t][r] += shuffle_xor(dot[t][r], lanes);
        if (S::SOFTCAP) dot[t][r] = a.softcap_log2 * tanh_of(dot[t][r] / a.softcap_log2);
        if (!exists[t] || position[t] > last_seen) dot[t][r] = minus_infinity();
        raised = largest(raised, dot[t][r]);
      }
      const float decay = exp2_fast(sums.maximum[r] - raised);
      sums.maximum[r] = raised;
      sums.total[r] *= decay;
#pragma unroll
      for (int i = 0; i < CHANNELS; i++) sums.out[r][i] *= decay;
#pragma unroll
      for (int t = 0; t < AT_ONCE; t++) {
        const float p = exp2_fast(dot[t][r] - raised);
        sums.total[r] += p;
#pragma unroll
        for (int i = 0; i < CHANNELS; i++) sums.out[r][i] += p * value[t][i];
      }
    }
  }
}
