// Barriers and the operations of a warp: every participant brings its operand, and the last one
// to arrive does the work for all.
#pragma once

#include <type_traits>

#include "block.h"

namespace cuda_host {

// `waits` is false for a thread that only arrives (bar.arrive).
inline void barrier(unsigned id, unsigned count, bool waits, const char* what) {
  Unobserved rig;
  if (id >= kBarriers) fail("%s: there is no barrier %u", what, id);
  Barrier& b = barriers[id];
  if (alive != num_threads && count == num_threads)
    fail("%s after other threads of the block have returned", what);
  if (b.arrived == 0) b.expected = count;
  if (b.expected != count) fail("%s: threads disagree about the barrier's count", what);
  char* order = &b.order[b.phase % 2];
  release(order);
  ++progress;
  if (++b.arrived < count) {
    if (!waits) return;
    b.waiting.push_back(current);
    wait(what);
    acquire(order);
    return;
  }
  std::vector<Thread*> waiting;
  waiting.swap(b.waiting);
  b.arrived = 0;
  ++b.phase;
  std::sort(waiting.begin(), waiting.end(),
            [](const Thread* a, const Thread* b) { return a->linear < b->linear; });
  wake(static_cast<unsigned>(waiting.size()), [&](unsigned i) { return waiting[i]; });
  if (waits) acquire(order);
}

// The lanes of `mask` meet; the last one calls work(lanes), lanes[l] being the operand of lane l,
// null for one that takes no part. `synchronises`: it orders their memory accesses too.
template <class Operand, class Work>
void meet(unsigned mask, const char* what, Operand& operand, bool synchronises, Work work) {
  Unobserved rig;
  Thread* self = current;
  const unsigned first = self->warp * 32;
  const unsigned bit = 1u << self->lane;
  const unsigned present =
      num_threads - first < 32 ? mask & ((1u << (num_threads - first)) - 1) : mask;
  if (!(mask & bit)) fail("%s: the calling lane is not in its own mask %08x", what, mask);
  if (present != mask && mask != ~0u)
    fail("%s: mask %08x names lanes beyond the block", what, mask);
  if (exited_lanes[self->warp] & present)
    fail("%s: mask %08x names lanes that have returned (%08x)", what, mask,
         exited_lanes[self->warp]);

  Meeting* mine = nullptr;
  for (Meeting& meeting : meetings[self->warp]) {
    if (meeting.arrived == 0) continue;
    if (meeting.mask == present && meeting.what == what)
      mine = &meeting;
    else if (meeting.mask & present)
      fail("%s: lanes of the same warp wait in %s with mask %08x", what, meeting.what,
           meeting.mask);
  }
  if (mine == nullptr) {
    for (Meeting& meeting : meetings[self->warp])
      if (mine == nullptr && meeting.arrived == 0) mine = &meeting;
    if (mine == nullptr) fail("%s: too many groups of lanes meet in one warp", what);
    mine->mask = present;
    mine->what = what;
  }
  char* order = &mine->order[mine->phase % 2];
  if (synchronises) release(order);
  mine->payload[self->lane] = &operand;
  mine->arrived |= bit;
  ++progress;
  if (mine->arrived != present) {
    wait(what);
  } else {
    Operand* lanes[32];
    for (unsigned lane = 0; lane < 32; ++lane)
      lanes[lane] = present >> lane & 1 ? static_cast<Operand*>(mine->payload[lane]) : nullptr;
    mine->arrived = 0;
    ++mine->phase;
    work(lanes);
    const unsigned others = present & ~bit;
    wake(32, [&](unsigned lane) { return others >> lane & 1 ? thread_of(first + lane) : nullptr; });
  }
  if (synchronises) acquire(order);
}

template <class T>
struct ShuffleOperand {
  T value;
  T result;
  int source;
};

template <class T>
T shuffle(unsigned mask, T value, int source, const char* what) {
  ShuffleOperand<T> operand{value, value, source};
  meet(mask, what, operand, false, [what](ShuffleOperand<T>** lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane] == nullptr) continue;
      const ShuffleOperand<T>* from = lanes[lanes[lane]->source];
      if (from == nullptr)
        fail("%s: lane %d reads from lane %d, which takes no part", what, lane,
             lanes[lane]->source);
      lanes[lane]->result = from->value;
    }
  });
  return operand.result;
}

template <class T, class Combine>
T reduce(unsigned mask, T value, const char* what, Combine combine) {
  ShuffleOperand<T> operand{value, value, 0};
  meet(mask, what, operand, false, [&](ShuffleOperand<T>** lanes) {
    bool is_first = true;
    T total{};
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane] == nullptr) continue;
      total = is_first ? lanes[lane]->value : static_cast<T>(combine(total, lanes[lane]->value));
      is_first = false;
    }
    for (int lane = 0; lane < 32; ++lane)
      if (lanes[lane] != nullptr) lanes[lane]->result = total;
  });
  return operand.result;
}

inline int lane() { return static_cast<int>(current->lane); }

}  // namespace cuda_host

inline void __syncthreads() {
  cuda_host::barrier(0, cuda_host::num_threads, true, "__syncthreads");
}

inline int __syncthreads_count(int predicate) {
  static int count;
  __syncthreads();
  {
    cuda_host::Unobserved rig;
    count = 0;
  }
  __syncthreads();
  {
    cuda_host::Unobserved rig;
    count += predicate != 0;
  }
  __syncthreads();
  cuda_host::Unobserved rig;
  return count;
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) > 0; }
inline int __syncthreads_and(int predicate) { return __syncthreads_count(!predicate) == 0; }

inline void __syncwarp(unsigned mask = ~0u) {
  int nothing = 0;
  cuda_host::meet(mask, "__syncwarp", nothing, true, [](int**) {});
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int group = cuda_host::lane() & ~(width - 1);
  return cuda_host::shuffle(mask, value, group | (source & (width - 1)), "__shfl_sync");
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int end = (cuda_host::lane() & ~(width - 1)) + width;
  const int source = cuda_host::lane() ^ lane_mask;
  return cuda_host::shuffle(mask, value, source < end ? source : cuda_host::lane(),
                            "__shfl_xor_sync");
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int end = (cuda_host::lane() & ~(width - 1)) + width;
  const int source = cuda_host::lane() + static_cast<int>(delta);
  return cuda_host::shuffle(mask, value, source < end ? source : cuda_host::lane(),
                            "__shfl_down_sync");
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int begin = cuda_host::lane() & ~(width - 1);
  const int source = cuda_host::lane() - static_cast<int>(delta);
  return cuda_host::shuffle(mask, value, source >= begin ? source : cuda_host::lane(),
                            "__shfl_up_sync");
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return cuda_host::reduce(mask, predicate ? 1u << cuda_host::lane() : 0u, "__ballot_sync",
                           [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate) {
  return cuda_host::reduce(mask, static_cast<int>(predicate != 0), "__any_sync",
                           [](int a, int b) { return a | b; });
}
inline int __all_sync(unsigned mask, int predicate) {
  return cuda_host::reduce(mask, static_cast<int>(predicate != 0), "__all_sync",
                           [](int a, int b) { return a & b; });
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  cuda_host::ShuffleOperand<T> operand{value, value, 0};
  cuda_host::meet(mask, "__match_any_sync", operand, false,
                  [](cuda_host::ShuffleOperand<T>** lanes) {
                    for (int a = 0; a < 32; ++a)
                      for (int b = 0; b < 32; ++b)
                        if (lanes[a] && lanes[b] && lanes[a]->value == lanes[b]->value)
                          lanes[a]->source |= static_cast<int>(1u << b);
                  });
  return static_cast<unsigned>(operand.source);
}

template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return cuda_host::reduce(mask, value, "__reduce_add_sync", [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return cuda_host::reduce(mask, value, "__reduce_max_sync",
                           [](T a, T b) { return a < b ? b : a; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return cuda_host::reduce(mask, value, "__reduce_min_sync",
                           [](T a, T b) { return b < a ? b : a; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return cuda_host::reduce(mask, value, "__reduce_or_sync",
                           [](unsigned a, unsigned b) { return a | b; });
}
