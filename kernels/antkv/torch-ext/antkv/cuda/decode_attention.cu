// Decode attention: a few query tokens over codes, anchors, sinks and window. A block keeps the tables of one kv head
// in shared memory, and each of its teams takes sequences' shares one after the other; merge_splits.py merges what they
// write.

// Where a warp's sum of a row stands: a lane's channels are D/8 neighbours, whose owners stand next to each other.
template <class S>
DEVICE uint32_t sum_place(uint32_t work, int warp, int row, int lane_of_channel, int channel_of_lane) {
  return work + S::SUMS + ((warp * S::ROWS + row) * S::D + channel_of_lane * 8 + lane_of_channel) * 4;
}

// Puts the maxima and totals of a warp's rows to where `store_partial` reads them; `total` is of a lane's tokens.
template <class S>
DEVICE void store_state(const Team<S>& team, const float (&maximum)[2], float (&total)[2]) {
  for (int k = 0; k < 2; k++) {
    for (int lanes = 4; lanes < 32; lanes *= 2) total[k] += shuffle_xor(total[k], lanes);
    const uint32_t state = team.work + (team.warp() * S::ROWS + 2 * team.lane() + k) * 8;
    if (2 * team.lane() < S::ROWS) {
      store_shared_float(state, maximum[k]);
      store_shared_float(state + 4, total[k]);
    }
  }
}

// Writes what the warps of a team found of `item`; `first_part`: that of codes or of exact tokens.
template <class S>
DEVICE void store_partial(const Arguments& a, int item, int h, int first_part, const Team<S>& team) {
  const int rows = a.group * a.q_len, b = item / a.splits, part = first_part + item % a.splits;
  const int64_t first_row = (((int64_t)b * a.heads + h) * 2 * a.splits + part) * rows;
  for (int i = team.thread; i < rows * S::D; i += S::TEAM_THREADS) {
    const int row = i / S::D, lane_of_channel = i % 8, channel_of_lane = i % S::D / 8;
    float peak = LOWEST, total = 0.0f, out = 0.0f;
    for (int w = 0; w < S::TEAM_WARPS; w++)
      peak = largest(peak, load_shared_float(team.work + (w * S::ROWS + row) * 8));
    for (int w = 0; w < S::TEAM_WARPS; w++) {
      const uint32_t state = team.work + (w * S::ROWS + row) * 8;
      const float weight = exp2_fast(load_shared_float(state) - peak);
      total += weight * load_shared_float(state + 4);
      out += weight * load_shared_float(sum_place<S>(team.work, w, row, lane_of_channel, channel_of_lane));
    }
    const int64_t to = first_row + row;
    a.partial[to * S::D + lane_of_channel * (S::D / 8) + channel_of_lane] = out;
    if (i % S::D == 0) {
      a.partial_max[to] = total > 0.0f ? peak : minus_infinity();
      a.partial_total[to] = total;
    }
  }
}

// What a team takes at a time: a part of the codes of a sequence, of its anchors, its tail and its sinks. Every phase
// finds it anew: kept, it would fill registers.
template <class S>
struct Share {
  Lengths<S> n;
  int b, split, first_code, last_code, first_anchor, last_anchor, first_tail, last_tail, sinks;

  DEVICE Share(const Arguments& a, uint32_t item, const Team<S>& team) : n(team.base) {
    item = settled(item);
    b = (int)item / a.splits, split = (int)item % a.splits;
    const int codes = ((n.coded() + S::SPAN - 1) / S::SPAN + a.splits - 1) / a.splits * S::SPAN;
    const int anchors = (n.anchors() + a.splits - 1) / a.splits, tail = (n.tail() + a.splits - 1) / a.splits;
    first_code = smaller(split * codes, n.coded()), last_code = smaller(first_code + codes, n.coded());
    first_anchor = smaller(split * anchors, n.anchors()), last_anchor = smaller(first_anchor + anchors, n.anchors());
    // From the other end: the first split has most anchors, where they do not divide evenly.
    first_tail = smaller((a.splits - 1 - split) * tail, n.tail()), last_tail = smaller(first_tail + tail, n.tail());
    sinks = split == a.splits - 1 ? a.sinks : 0;
  }
};

// Asks for `count` rows of `bytes` from row `first` on to be in the L2 cache, the first 32 KB of them.
template <class S>
DEVICE void ask_for_rows(const void* p, int64_t first, int count, int bytes, const Team<S>& team) {
  const int size = smaller(count * bytes, 32768);
#pragma unroll 1
  for (int i = 128 * team.thread; i < size; i += 128 * S::TEAM_THREADS) ask_for((const uint8_t*)p + first * bytes + i);
}

// Asks for what a share begins with: its exact tokens and its first codes.
template <class S>
DEVICE void ask_for_share(const Arguments& a, int item, int h, const Team<S>& team) {
  const Share<S> share(a, item, team);
  const int64_t bh = (int64_t)share.b * a.heads + h, anchor = bh * a.anchor_capacity + share.first_anchor;
  const int anchors = share.last_anchor - share.first_anchor, bytes = S::D * (a.anchor_kind == 1 ? 1 : 2);
  ask_for_rows<S>(a.anchor_positions, anchor, anchors, 4, team);
  ask_for_rows<S>(a.anchor_keys, anchor, anchors, bytes, team);
  ask_for_rows<S>(a.anchor_values, anchor, anchors, bytes, team);
  if (a.anchor_kind == 1) {
    ask_for_rows<S>(a.anchor_key_scale, anchor, anchors, 2, team);
    ask_for_rows<S>(a.anchor_value_scale, anchor, anchors, 2, team);
  }
  const int64_t tail = bh * a.tail_capacity + share.first_tail, code = bh * a.capacity + share.first_code;
  const int in_tail = share.last_tail - share.first_tail, codes = smaller(S::SPAN, share.last_code - share.first_code);
  ask_for_rows<S>(a.tail_keys, tail, in_tail, 2 * S::D, team);
  ask_for_rows<S>(a.tail_values, tail, in_tail, 2 * S::D, team);
  ask_for_rows<S>(a.sink_keys, bh * a.sinks, share.sinks, 2 * S::D, team);
  ask_for_rows<S>(a.sink_values, bh * a.sinks, share.sinks, 2 * S::D, team);
  ask_for_rows<S>(a.key_codes, code, codes, S::Key::WIDTH, team);
  ask_for_rows<S>(a.value_codes, code, codes, S::Value::WIDTH, team);
}

// The share's codes, to the team's sums in shared memory.
template <class S>
DEVICE void sum_codes(const Arguments& a, int item, int h, const Team<S>& team) {
  const Share<S> share(a, item, team);
  const int g = team.lane() / 4, c = team.lane() % 4;
  CodeSums<S> sums = {{LOWEST, LOWEST}, {}, {}};
  attend_codes<S>(a, share.b, h, share.first_code, share.last_code, team, sums);
  team.sync();  // queries were read: their place is free
  store_state<S>(team, sums.maximum, sums.total);
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

// Its exact tokens, likewise.
template <class S>
DEVICE void sum_exact(const Arguments& a, int item, int h, const Team<S>& team) {
  const Share<S> share(a, item, team);
  const Lengths<S>& n = share.n;
  constexpr int WARPS = S::TEAM_WARPS;
  const int g = team.lane() / 4, c = team.lane() % 4, b = share.b, length = n.coded() + n.tail();
  const bool neighbours = n.neighbours();
  store_query<S>(a, b, h, neighbours, team);
  ExactSums<S> sums = {{LOWEST, LOWEST}, {}, {}};
  team.sync();
  const int tail_warp = (share.last_anchor - share.first_anchor + 15) / 16 % WARPS;
  const int sink_warp = (tail_warp + (share.last_tail - share.first_tail + 15) / 16) % WARPS;
  if (a.anchor_kind == 1)
    attend_exact<S, INT8>(a, b, h, share.first_anchor, share.last_anchor, a.anchor_capacity, a.anchor_positions,
                          a.anchor_keys, a.anchor_values, a.anchor_key_scale, a.anchor_value_scale, 0, length, 0,
                          neighbours, team, sums);
#pragma unroll 1
  for (int set = a.anchor_kind == 2 ? 0 : 1; set < 3; set++) {  // plain ones: anchors, tail, sinks
    const int from = set == 0 ? share.first_anchor : set == 1 ? share.first_tail : 0;
    const int to = set == 0 ? share.last_anchor : set == 1 ? share.last_tail : share.sinks;
    const int capacity = set == 0 ? a.anchor_capacity : set == 1 ? a.tail_capacity : a.sinks;
    const int* positions = set == 0 ? a.anchor_positions : set == 1 ? 0 : a.sink_positions;
    const void* keys = set == 0 ? a.anchor_keys : set == 1 ? a.tail_keys : a.sink_keys;
    const void* values = set == 0 ? a.anchor_values : set == 1 ? a.tail_values : a.sink_values;
    const int first_warp = set == 0 ? 0 : set == 1 ? tail_warp : sink_warp;
    attend_exact<S, PLAIN>(a, b, h, from, to, capacity, positions, keys, values, 0, 0, n.coded(), length, first_warp,
                           neighbours, team, sums);
  }
  team.sync();  // queries were read
  store_state<S>(team, sums.maximum, sums.total);
#pragma unroll
  for (int i = 0; i < S::D / 16; i++)
#pragma unroll
    for (int k = 0; k < 4; k++)
      if (2 * c + k % 2 < S::ROWS)
        store_shared_float(sum_place<S>(team.work, team.warp(), 2 * c + k % 2, g, 2 * i + k / 2), sums.out[i][k]);
}

template <class S>
DEVICE void decode(const Arguments& a, int block, int thread, uint8_t* memory) {
  const int h = block / a.blocks_per_head, stride = S::TEAMS * a.blocks_per_head;
  const Team<S> team(shared_address(memory), thread);
  const bool neighbours = begin_tables<S>(a, h, team.base, thread);
  if (thread == 0) Lengths<S>::store(a, team.base, neighbours);
  sync_block();
  const int items = a.batch * a.splits;
#pragma unroll 1
  for (int item = team.number * a.blocks_per_head + block % a.blocks_per_head;; item += stride) {
    const bool exists = item < items, is_first = item < stride;
    if (!exists && !is_first) break;
    // What comes next, and at first what comes now, is to be near when it is needed.
#pragma unroll 1
    for (int asked = is_first ? item : item + stride; asked < items && asked <= item + stride; asked += stride)
      ask_for_share<S>(a, asked, h, team);
    // Exact tokens come first: they need no tables, which may be on their way. One loop is half as many instructions,
    // and a short step waits for those too.
#pragma unroll 1
    for (int codes = 0; codes < 2; codes++) {
      if (codes && is_first) finish_tables<S>(team.base, thread);  // from here on every team waits for itself alone
      if (!exists) continue;
      if (codes) sum_codes<S>(a, item, h, team);
      else sum_exact<S>(a, item, h, team);
      team.sync();
      store_partial<S>(a, item, h, codes ? 0 : a.splits, team);
      team.sync();
    }
  }
}

// What is compiled: one shape. cuda_decode.py adds a line such as DECODE_KERNEL(Shape<64, 1, 8, 1, 8, ...>).
#ifndef DECODE_KERNEL
#define DECODE_KERNEL(...)                                                                                          \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__::THREADS, 1) decode_attention(const Arguments a) {       \
    SHARED_MEMORY                                                                                                   \
    decode<__VA_ARGS__>(a, blockIdx.x, threadIdx.x, shared_memory);                                                 \
  }

#endif
