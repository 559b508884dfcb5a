// Decode attention: a few query tokens over codes, anchors, sinks and window. A block keeps the tables of one kv head
// in shared memory, and each of its teams takes sequences' shares one after the other; merge_splits.py merges what they
// write.

// Where a warp's sum of a row stands: a lane's channels are D/8 neighbours, whose owners stand next to each other.
template <class S>
DEVICE uint32_t sum_place(uint32_t work, int warp, int row, int lane_of_channel, int channel_of_lane) {
  return work + S::SUMS + ((warp * S::ROWS + row) * S::D + channel_of_lane * 8 + lane_of_channel) * 4;
}

// Puts the maxima and totals of a warp's rows to where `store_partial` reads them; `total` is of a lane's tokens. The
// lanes of a row are FIRST_LANE, twice FIRST_LANE, ... apart.
template <class S, int FIRST_LANE>
DEVICE void store_state(const Team<S>& team, const float (&maximum)[2], float (&total)[2]) {
  for (int k = 0; k < 2; k++) {
    for (int lanes = FIRST_LANE; lanes < 32; lanes *= 2) total[k] += shuffle_xor(total[k], lanes);
    const uint32_t state = team.work + (team.warp() * S::ROWS + 2 * team.lane() + k) * 8;
    if (2 * team.lane() < S::ROWS) {
      store_shared_float(state, maximum[k]);
      store_shared_float(state + 4, total[k]);
    }
  }
}

// Writes what the warps of a team found to part `part` of (b, h). A thread has four neighbours of a row as they stand
// in shared memory, so that it weighs each warp once for all of them.
template <class S>
DEVICE void store_partial(const Arguments& a, int64_t bh, int part, const Team<S>& team) {
  const int rows = a.group * a.q_len;
#pragma unroll 1
  for (uint32_t i = team.thread; i < rows * (S::D / 4); i += S::TEAM_THREADS) {
    const uint32_t row = i / (S::D / 4), lane_of_channel = i % 2 * 4, channel_of_lane = i % (S::D / 4) / 2;
    uint32_t state[S::TEAM_WARPS][2];
    float peak = LOWEST, total = 0.0f, out[4] = {};
#pragma unroll
    for (int w = 0; w < S::TEAM_WARPS; w++) {
      load_shared_64(team.work + (w * S::ROWS + row) * 8, state[w]);
      peak = largest(peak, as_float(state[w][0]));
    }
#pragma unroll
    for (int w = 0; w < S::TEAM_WARPS; w++) {
      uint32_t sum[4];
      load_shared_128(sum_place<S>(team.work, w, row, lane_of_channel, channel_of_lane), sum);
      const float weight = exp2_fast(as_float(state[w][0]) - peak);
      total += weight * as_float(state[w][1]);
      for (int k = 0; k < 4; k++) out[k] += weight * as_float(sum[k]);
    }
    const int64_t to = (bh * 2 * a.splits + part) * rows + row;
    float* partial = a.partial + (to * S::D + lane_of_channel * (S::D / 8) + channel_of_lane);
    for (int k = 0; k < 4; k++) partial[k * (S::D / 8)] = out[k];
    if (i % (S::D / 4) == 0) {
      a.partial_max[to] = total > 0.0f ? peak : minus_infinity();
      a.partial_total[to] = total;
    }
  }
}

// The codes first..last-1 of (b, h), to the team's sums in shared memory.
template <class S>
DEVICE void sum_codes(const Arguments& a, int b, int h, int first, int last, const Team<S>& team) {
  const int g = team.lane() / 4, c = team.lane() % 4;
  CodeSums<S> sums = {{LOWEST, LOWEST}, {}, {}};
  attend_codes<S>(a, b, h, first, last, team, sums);
  team.sync();  // queries were read: their place is free
  store_state<S, S::ROW_LANES>(team, sums.maximum, sums.total);
  constexpr int WORDS = S::VALUE_ENTRY / 2;
#pragma unroll
  for (int i = 0; i < S::D / 32 * S::GROUPS; i++)
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int entry = S::GROUPS == 1 ? i / WORDS * 2 + c / 2 : i / WORDS, row = (2 * c + k % 2) % S::ROWS;
      const int channel = entry * S::VALUE_ENTRY + i % WORDS * 2 + k / 2;
      store_shared_float(sum_place<S>(team.work, team.warp(), row, g, channel), sums.out[i][k]);
    }
}

// The share `split` of the exact tokens of (b, h), likewise.
template <class S>
DEVICE void sum_exact(const Arguments& a, int b, int h, int split, const Lengths<S>& n, const Team<S>& team) {
  const int g = team.lane() / 4, c = team.lane() % 4, coded = n.coded, tail = n.tail, anchors = n.anchors;
  const int length = coded + tail;
  const bool neighbours = n.neighbours;
  store_query<S>(a, b, h, neighbours, team);
  ExactSums<S> sums = {{LOWEST, LOWEST}, {}, {}};
  team.sync();
  const int part = (anchors + a.splits - 1) / a.splits, first = split * part;
  const int last = first + part < anchors ? first + part : anchors;
  const int sinks = split == a.splits - 1 ? a.sinks : 0;
  const int tail_part = (tail + a.splits - 1) / a.splits, tail_first = (a.splits - 1 - split) * tail_part;
  const int tail_last = tail_first + tail_part < tail ? tail_first + tail_part : tail;
  constexpr int WARPS = S::TEAM_WARPS;
  const int tail_warp = (part + 15) / 16 % WARPS, sink_warp = (tail_warp + (tail_part + 15) / 16) % WARPS;
  if (a.anchor_kind == 1)
    attend_exact<S, INT8>(a, b, h, first, last, a.anchor_capacity, a.anchor_positions, a.anchor_keys, a.anchor_values,
                          a.anchor_key_scale, a.anchor_value_scale, 0, length, 0, neighbours, team, sums);
#pragma unroll 1
  for (int set = a.anchor_kind == 2 ? 0 : 1; set < 3; set++) {  // plain ones: anchors, tail, sinks
    const int from = set == 0 ? first : set == 1 ? tail_first : 0, to = set == 0 ? last : set == 1 ? tail_last : sinks;
    const int capacity = set == 0 ? a.anchor_capacity : set == 1 ? a.tail_capacity : a.sinks;
    const int* positions = set == 0 ? a.anchor_positions : set == 1 ? 0 : a.sink_positions;
    const void* keys = set == 0 ? a.anchor_keys : set == 1 ? a.tail_keys : a.sink_keys;
    const void* values = set == 0 ? a.anchor_values : set == 1 ? a.tail_values : a.sink_values;
    const int first_warp = set == 0 ? 0 : set == 1 ? tail_warp : sink_warp;
    attend_exact<S, PLAIN>(a, b, h, from, to, capacity, positions, keys, values, 0, 0, coded, length, first_warp,
                           neighbours, team, sums);
  }
  team.sync();  // queries were read
  store_state<S, 4>(team, sums.maximum, sums.total);
#pragma unroll
  for (int i = 0; i < S::D / 16; i++)
#pragma unroll
    for (int k = 0; k < 4; k++)
      if (2 * c + k % 2 < S::ROWS)
        store_shared_float(sum_place<S>(team.work, team.warp(), 2 * c + k % 2, g, 2 * i + k / 2), sums.out[i][k]);
}

template <class S>
DEVICE void decode(const Arguments& a, int block, int thread, uint8_t* memory) {
  const int h = block / a.blocks_per_head;
  const Team<S> team(shared_address(memory), thread);
  begin_block<S>(a, h, team.base, thread);
  const int first_item = team.number * a.blocks_per_head + block % a.blocks_per_head;  // busy teams in all blocks
#pragma unroll 1
  for (int item = first_item; item < a.batch * a.splits; item += S::TEAMS * a.blocks_per_head) {
    // Exact tokens first: they need no tables, which may be on their way. In a loop, so that what follows is there once.
#pragma unroll 1
    for (int codes = 0; codes < 2; codes++) {
      // Found anew each time: kept, it would fill registers.
      const int i = (int)settled(item), b = i / a.splits, split = i % a.splits;
      const int64_t bh = (int64_t)b * a.heads + h;
      const Lengths<S> n(team.base);
      const int share = ((n.coded + S::SPAN - 1) / S::SPAN + a.splits - 1) / a.splits * S::SPAN;
      const int first = split * share, last = first + share < n.coded ? first + share : n.coded;
      if (codes) sum_codes<S>(a, b, h, first, last, team);
      else sum_exact<S>(a, b, h, split, n, team);
      team.sync();
      store_partial<S>(a, bh, codes ? split : a.splits + split, team);
      team.sync();
    }
  }
  wait_for_copy(team.base + S::ARRIVALS);  // of those who had no share, or no codes
}

// What is compiled: one shape. cuda_decode.py adds a line such as DECODE_KERNEL(Shape<64, 1, 8, 1, 8, ...>).
#ifndef DECODE_KERNEL
#define DECODE_KERNEL(...)                                                                                          \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__::THREADS, 1) decode_attention(const Arguments a) {       \
    SHARED_MEMORY                                                                                                   \
    decode<__VA_ARGS__>(a, blockIdx.x, threadIdx.x, shared_memory);                                                 \
  }

#endif
