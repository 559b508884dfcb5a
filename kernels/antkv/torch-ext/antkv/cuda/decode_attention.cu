// Decode attention: a few query tokens over codes, anchors, sinks and window. A block keeps the tables of one kv head
// in shared memory and takes the sequences' shares one after the other; merge_splits.py merges what it writes.

// Writes what the warps of a block found to part `part` of (b, h).
template <class S>
DEVICE void store_partial(const Arguments& a, int64_t bh, int part, uint32_t memory, int thread) {
  const int rows = a.group * a.q_len;
  for (int i = thread; i < rows * S::D; i += S::THREADS) {
    const int row = i / S::D, d = i % S::D;
    float peak = LOWEST, total = 0.0f, out = 0.0f;
    for (int w = 0; w < S::THREADS / 32; w++)
      peak = largest(peak, load_shared_float(memory + S::AFTER_LOOP + (w * S::ROWS + row) * 8));
    for (int w = 0; w < S::THREADS / 32; w++) {
      const uint32_t state = memory + S::AFTER_LOOP + (w * S::ROWS + row) * 8;
      const float weight = exp2_fast(load_shared_float(state) - peak);
      total += weight * load_shared_float(state + 4);
      out += weight * load_shared_float(memory + S::SUMS + ((w * S::ROWS + row) * S::D + d) * 4);
    }
    const int64_t to = (bh * 2 * a.splits + part) * rows + row;
    a.partial[to * S::D + d] = out;
    if (d == 0) {
      a.partial_max[to] = total > 0.0f ? peak : minus_infinity();
      a.partial_total[to] = total;
    }
  }
}

template <class S>
DEVICE void decode(const Arguments& a, int block, int thread, uint8_t* memory) {
  const int h = block / a.blocks_per_head, first_item = block % a.blocks_per_head;
  const int warp = thread / 32, lane = thread % 32, g = lane / 4, c = lane % 4;
  const int coded = a.lengths ? a.lengths[0] : a.coded, tail = a.lengths ? a.lengths[1] : a.tail;
  const int anchors = a.lengths ? a.lengths[2] : a.anchors, length = coded + tail;
  const uint32_t base = shared_address(memory);
  fill_tables<S>(a, h, memory, thread);
  sync_block();
  const int share = ((coded + S::SPAN - 1) / S::SPAN + a.splits - 1) / a.splits * S::SPAN;
  for (int item = first_item; item < a.batch * a.splits; item += a.blocks_per_head) {
    const int b = item / a.splits, split = item % a.splits;
    const int64_t bh = (int64_t)b * a.heads + h;
    {
      CodeSums<S> sums;
      for (int k = 0; k < 2; k++) sums.maximum[k] = LOWEST, sums.total[k] = 0.0f;
      for (int group = 0; group < S::GROUPS; group++)
        for (int j = 0; j < S::SUBS / 4; j++)
          for (int k = 0; k < 4; k++) sums.out[group][j][k] = 0.0f;
      const int first = split * share, last = first + share < coded ? first + share : coded;
      attend_codes<S>(a, b, h, first, last, memory, thread, sums);
      for (int k = 0; k < 2; k++)
        for (int lanes = 4; lanes < 32; lanes *= 2) sums.total[k] += shuffle_xor(sums.total[k], lanes);
      sync_block();  // queries and probabilities were read: their place is free
      if (g == 0 && (S::GROUPS == 2 || c < 2))
        for (int k = 0; k < 2; k++) {
          const uint32_t state = base + S::AFTER_LOOP + (warp * S::ROWS + 2 * c + k) * 8;
          store_shared_float(state, sums.maximum[k]);
          store_shared_float(state + 4, sums.total[k]);
        }
      for (int group = 0; group < S::GROUPS; group++)
        for (int j = 0; j < S::SUBS / 4; j++)
          for (int k = 0; k < 4; k++) {
            const int row = group * 4 + g % 4, sub = j * 4 + g / 4 + k / 2 * 2;
            store_shared_float(base + S::SUMS + ((warp * S::ROWS + row) * S::D + sub * 8 + 2 * c + k % 2) * 4,
                               sums.out[group][j][k]);
          }
    }
    sync_block();
    store_partial<S>(a, bh, split, base, thread);
    {
      ExactSums<S> sums;
      for (int r = 0; r < S::ROWS; r++) {
        sums.maximum[r] = LOWEST;
        sums.total[r] = 0.0f;
        for (int i = 0; i < S::D / 16; i++) sums.out[r][i] = 0.0f;
      }
      const int e = lane % 16;
      LanePairs<S> pairs;
      load_pairs<S>(a, h, e, pairs);
      load_query<S>(a, b, h, pairs);
      const int part = (anchors + a.splits - 1) / a.splits, first = split * part;
      const int last = first + part < anchors ? first + part : anchors;
      if (a.anchor_kind == 1)
        attend_exact<S, INT8>(a, b, h, first, last, a.anchor_capacity, a.anchor_positions, a.anchor_keys,
                              a.anchor_values, a.anchor_key_scale, a.anchor_value_scale, 0, length, thread, pairs, sums);
      if (a.anchor_kind == 2)
        attend_exact<S, HALF>(a, b, h, first, last, a.anchor_capacity, a.anchor_positions, a.anchor_keys,
                              a.anchor_values, 0, 0, 0, length, thread, pairs, sums);
      const int sinks = split == a.splits - 1 ? a.sinks : 0;
      const int tail_part = (tail + a.splits - 1) / a.splits, tail_first = (a.splits - 1 - split) * tail_part;
      const int tail_last = tail_first + tail_part < tail ? tail_first + tail_part : tail;
      if (a.is_bfloat) {
        attend_exact<S, BFLOAT>(a, b, h, 0, sinks, a.sinks, a.sink_positions, a.sink_keys, a.sink_values, 0, 0, 0, length,
                                thread, pairs, sums);
        attend_exact<S, BFLOAT>(a, b, h, tail_first, tail_last, a.tail_capacity, 0, a.tail_keys, a.tail_values, 0, 0,
                                coded, length, thread, pairs, sums);
      } else {
        attend_exact<S, HALF>(a, b, h, 0, sinks, a.sinks, a.sink_positions, a.sink_keys, a.sink_values, 0, 0, 0, length,
                              thread, pairs, sums);
        attend_exact<S, HALF>(a, b, h, tail_first, tail_last, a.tail_capacity, 0, a.tail_keys, a.tail_values, 0, 0, coded,
                              length, thread, pairs, sums);
      }
      sync_block();  // the codes' sums were stored
#pragma unroll
      for (int r = 0; r < S::ROWS; r++) {
        const float peak = largest(sums.maximum[r], shuffle_xor(sums.maximum[r], 16));
        const float weight = exp2_fast(sums.maximum[r] - peak), total = sums.total[r] * weight;
        const float both = total + shuffle_xor(total, 16);
        const uint32_t state = base + S::AFTER_LOOP + (warp * S::ROWS + r) * 8;
        if (lane == 0) {
          store_shared_float(state, peak);
          store_shared_float(state + 4, both);
        }
        for (int i = 0; i < S::D / 16; i++) {
          const float part_sum = sums.out[r][i] * weight, sum = part_sum + shuffle_xor(part_sum, 16);
          if (lane < 16)
            store_shared_float(base + S::SUMS + ((warp * S::ROWS + r) * S::D + e * (S::D / 16) + i) * 4, sum);
        }
      }
    }
    sync_block();
    store_partial<S>(a, bh, a.splits + split, base, thread);
    sync_block();
  }
}

// What is compiled: one shape. cuda_decode.py adds a line such as DECODE_KERNEL(Shape<128, 1, 1, 1, 12, true, false>).
#ifndef DECODE_KERNEL
#define DECODE_KERNEL(...)                                                                                          \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__::THREADS, 1) decode_attention(const Arguments a) {       \
    SHARED_MEMORY                                                                                                   \
    decode<__VA_ARGS__>(a, blockIdx.x, threadIdx.x, shared_memory);                                                 \
  }

#endif
