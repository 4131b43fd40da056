// Runs the blocks of a grid one after another, and the threads of a block in a chosen order.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "fibers.h"

namespace cuda_host {

// ---- Schedules --------------------------------------------------------------------------------

enum class Order { kForward, kReverse, kDepthFirst, kRandom };

struct Schedule {
  Order order = Order::kForward;
  uint64_t seed = 1;
  bool late = true;  // asynchronous operations happen when they are waited for, else at once
};

inline Schedule schedule;

// CUDA_HOST_SCHEDULE: words such as "random seed=3 early".
inline Schedule schedule_from_environment() {
  Schedule s;
  const char* text = getenv("CUDA_HOST_SCHEDULE");
  if (text == nullptr) return s;
  std::string words = text;
  for (size_t begin = 0; begin < words.size();) {
    const size_t end = std::min(words.find(' ', begin), words.size());
    const std::string word = words.substr(begin, end - begin);
    begin = end + 1;
    if (word == "forward")
      s.order = Order::kForward;
    else if (word == "reverse")
      s.order = Order::kReverse;
    else if (word == "depth_first")
      s.order = Order::kDepthFirst;
    else if (word == "random")
      s.order = Order::kRandom;
    else if (word == "early")
      s.late = false;
    else if (word.rfind("seed=", 0) == 0)
      s.seed = std::stoull(word.substr(5));
    else if (!word.empty())
      throw std::runtime_error("CUDA_HOST_SCHEDULE: unknown word " + word);
  }
  return s;
}

inline uint64_t random_state = 1;
inline uint32_t random_number() {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(random_state >> 33);
}

// ---- The block that runs -----------------------------------------------------------------------

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxWarps = kMaxThreads / 32;
constexpr size_t kSharedLimit = 227 * 1024;
constexpr size_t kStaticLimit = 48 * 1024;
constexpr size_t kArena = 256 * 1024;

// Shared memory and fibers. ThreadSanitizer's build has two sets for blocks in turn, between
// which nothing but atomics synchronises: two neighbouring blocks that touch the same global
// memory are a race there.
struct Unit {
  alignas(1024) unsigned char arena[kArena];  // one arena: shared addresses have 32 bits
  std::vector<Thread*> fibers;
  char begin;  // what threads have seen when a block of this unit begins
  char end;    // what they have done when it ends
};

#if defined(__SANITIZE_THREAD__)
constexpr unsigned kUnits = 2;
#else
constexpr unsigned kUnits = 1;
#endif
inline Unit units[kUnits];
inline Unit* unit = &units[0];

struct Barrier {
  unsigned arrived = 0;
  unsigned expected = 0;
  unsigned phase = 0;
  std::vector<Thread*> waiting;
  char order[2];  // by the phase's parity: who passes must not see what others do after it
};

// A collective operation of a warp, under way.
struct Meeting {
  unsigned mask = 0;
  unsigned arrived = 0;
  unsigned phase = 0;
  const char* what = nullptr;
  void* payload[32];
  char order[2];
};

struct StaticVariable {
  const void* key;
  size_t offset;
};

constexpr unsigned kBarriers = 16;
constexpr unsigned kMeetings = 8;
inline Barrier barriers[kBarriers];
inline Meeting meetings[kMaxWarps][kMeetings];
inline unsigned exited_lanes[kMaxWarps];
inline std::vector<StaticVariable> static_variables;
inline size_t dynamic_bytes = 0;
inline size_t static_end = 0;
inline unsigned num_threads = 0;
inline unsigned alive = 0;
inline uint64_t progress = 0;  // counts events, so that endless spinning is recognised
inline uint3 block_index{};
inline dim3 block_dim;
inline dim3 grid_dim;

inline const char* kernel_name = "";
inline std::function<void()> kernel_body;
inline std::string failure;
inline std::vector<std::function<void()>> at_block_start;  // resets of further instruments
inline std::vector<std::function<void()>> at_block_end;    // ... and what they have to say
inline uint64_t launches = 0;

inline Thread* thread_of(unsigned linear) { return unit->fibers[linear]; }

// Ends the launch with an error that says where every thread waits. Fibers cannot throw through
// each other's stacks: `run` throws, and the fibers are left behind.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  Unobserved rig;
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  char where[256];
  snprintf(where, sizeof(where),
           "cuda_host: %s, block (%u, %u, %u), thread (%u, %u, %u): ", kernel_name, block_index.x,
           block_index.y, block_index.z, current->index.x, current->index.y, current->index.z);
  failure = std::string(where) + text;
  const char* last = nullptr;
  for (unsigned i = 0; i < num_threads && i < unit->fibers.size(); ++i) {
    const Thread* thread = thread_of(i);
    const char* waits = thread->state == State::kWaiting ? thread->waits_in : nullptr;
    if (waits != nullptr && (i % 32 == 0 || waits != last))
      failure += "\n  from thread " + std::to_string(i) + ": waits in " + waits;
    last = waits;
  }
  if (current == &launching_thread) throw std::runtime_error(failure);
  switch_to(&launching_thread, true);
  abort();
}

// ---- Scheduling --------------------------------------------------------------------------------

inline std::vector<Thread*> ready;
inline size_t ready_begin = 0;

inline void make_ready(Thread* thread) {
  thread->state = State::kReady;
  ready.push_back(thread);
}

// Makes the threads get(0), ..., get(count - 1) ready, null ones apart, in the schedule's order.
template <class Get>
void wake(unsigned count, Get get) {
  const bool reverse = schedule.order == Order::kReverse;
  for (unsigned i = 0; i < count; ++i)
    if (Thread* thread = get(reverse ? count - 1 - i : i)) make_ready(thread);
}

// Each lets a unit beside the threads do something that it was asked for; false: there is nothing.
inline std::vector<bool (*)()> when_nobody_is_ready;

inline Thread* take_ready() {
  while (ready_begin == ready.size()) {
    if (alive == 0) return &launching_thread;
    bool goes_on = false;
    for (const auto& advance : when_nobody_is_ready) goes_on = advance() || goes_on;
    if (!goes_on) fail("deadlock: every thread that has not returned waits");
  }
  Thread* next;
  if (schedule.order == Order::kRandom)
    std::swap(ready[ready_begin + random_number() % (ready.size() - ready_begin)], ready.back());
  if (schedule.order == Order::kRandom || schedule.order == Order::kDepthFirst) {
    next = ready.back();
    ready.pop_back();
  } else {
    next = ready[ready_begin++];
  }
  if (ready_begin == ready.size()) {
    ready.clear();
    ready_begin = 0;
  }
  return next;
}

inline void wait(const char* what) {
  current->state = State::kWaiting;
  current->waits_in = what;
  switch_to(take_ready());
}

// Lets others run in a loop that waits for them.
inline void yield(const char* what) {
  static uint64_t seen = 0;
  static uint64_t idle = 0;
  current->waits_in = what;
  if (seen != progress) {
    seen = progress;
    idle = 0;
  } else if (++idle > 64u * num_threads + 1024) {
    fail("deadlock: spins for ever in %s", what);
  }
  if (ready_begin == ready.size()) return;
  // Depth first would take the spinning thread again at once.
  if (schedule.order == Order::kDepthFirst)
    ready.insert(ready.begin() + ready_begin, current);
  else
    ready.push_back(current);
  switch_to(take_ready());
}

inline void fiber_entry() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (launching_thread.stack == nullptr) {
    launching_thread.stack = static_cast<char*>(const_cast<void*>(bottom));
    launching_thread.stack_bytes = bytes;
  }
#endif
  for (;;) {
    acquire(&unit->begin);
    kernel_body();
    Unobserved rig;
    current->uncommitted_copies.clear();
    current->copy_groups.clear();
    current->state = State::kDone;
    exited_lanes[current->warp] |= 1u << current->lane;
    --alive;
    ++progress;
    release(&unit->end);
    switch_to(take_ready());
  }
}

// ---- Shared memory -----------------------------------------------------------------------------

// A static variable of the block, between red zones.
template <class T, class Tag>
T& static_shared() {
  static const char key = 0;
  Unobserved rig;
  for (const StaticVariable& variable : static_variables)
    if (variable.key == &key) return *reinterpret_cast<T*>(unit->arena + variable.offset);
  constexpr size_t kRedZone = 64;
  const size_t offset = (static_end + kRedZone + 127) / 128 * 128;
  static_assert(alignof(T) <= 128);
  static_end = offset + sizeof(T);
  if (static_end - dynamic_bytes > kStaticLimit + 4096 || static_end > kArena)
    fail("more than %zu bytes of static shared memory", kStaticLimit);
  allow(unit->arena + offset, sizeof(T));
  static_variables.push_back({&key, offset});
  return *reinterpret_cast<T*>(unit->arena + offset);
}

inline uint32_t shared_address(const void* pointer) {
  const ptrdiff_t offset = static_cast<const unsigned char*>(pointer) - unit->arena;
  if (offset < 0 || static_cast<size_t>(offset) >= kArena) fail("not an address in shared memory");
  return static_cast<uint32_t>(offset);
}

inline unsigned char* shared_pointer(uint32_t address) {
  if (address >= kArena) fail("shared address %u is out of range", address);
  return unit->arena + address;
}

// ---- Blocks and grids --------------------------------------------------------------------------

inline void run_block(uint3 index) {
  block_index = index;
  for (Barrier& barrier : barriers) {
    barrier.arrived = 0;
    barrier.waiting.clear();
  }
  for (auto& of_warp : meetings)
    for (Meeting& meeting : of_warp) meeting.arrived = 0;
  memset(exited_lanes, 0, sizeof(exited_lanes));
  static_variables.clear();
  static_end = (dynamic_bytes + 1023) / 1024 * 1024;
  // NaN as a number of any float type, -1 as an integer: nobody may count on zeros.
  allow(unit->arena, kArena);
  memset(unit->arena, 0xFF, kArena);
  forbid(unit->arena, kArena);
  allow(unit->arena, dynamic_bytes);
  for (auto& reset : at_block_start) reset();
  acquire(&unit->end);
  release(&unit->begin);
  alive = num_threads;
  wake(num_threads, thread_of);
  switch_to(take_ready());
  if (failure.empty()) {
    for (auto& check : at_block_end) check();
    return;
  }
  // The fibers stopped in the middle: they and what they wait in are given up.
  for (Unit& each : units) each.fibers.clear();
  for (Barrier& barrier : barriers) barrier = Barrier{};
  for (auto& of_warp : meetings)
    for (Meeting& meeting : of_warp) meeting = Meeting{};
  ready.clear();
  ready_begin = 0;
  throw std::runtime_error(std::exchange(failure, {}));
}

inline void prepare_unit(Unit& each) {
  while (each.fibers.size() < num_threads)
    each.fibers.push_back(new_fiber(&fiber_entry, each.fibers.size()));
  for (unsigned i = 0; i < num_threads; ++i) {
    Thread* thread = each.fibers[i];
    thread->linear = i;
    thread->lane = i % 32;
    thread->warp = i / 32;
    thread->index =
        uint3{i % block_dim.x, i / block_dim.x % block_dim.y, i / (block_dim.x * block_dim.y)};
  }
}

inline std::vector<uint3> order_of_blocks(dim3 grid) {
  std::vector<uint3> blocks;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back(uint3{x, y, z});
  if (schedule.order == Order::kReverse) std::reverse(blocks.begin(), blocks.end());
  if (schedule.order == Order::kRandom)
    for (size_t i = blocks.size(); i > 1; --i)
      std::swap(blocks[i - 1], blocks[random_number() % i]);
  return blocks;
}

// Executes a kernel. Throws std::runtime_error for what a GPU would refuse, hang on or leave
// undefined.
template <class... Parameters, class... Arguments>
void run(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
         size_t shared_bytes, Arguments&&... arguments) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  Unobserved rig;
  const auto refuse = [&](const char* why) {
    throw std::runtime_error(std::string("cuda_host: ") + name + ": " + why);
  };
  schedule = schedule_from_environment();
  random_state = schedule.seed * 2 + 1;
  num_threads = block.x * block.y * block.z;
  if (num_threads == 0 || num_threads > kMaxThreads) refuse("a block has 1 to 1024 threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 ||
      grid.z > 65535)
    refuse("the grid is empty or too large");
  if (shared_bytes > kSharedLimit) refuse("more than 227 KiB of shared memory");
  kernel_name = name;
  block_dim = block;
  grid_dim = grid;
  dynamic_bytes = shared_bytes;
  ++launches;
  std::tuple<Parameters...> parameters(static_cast<Parameters>(arguments)...);
  kernel_body = [&] { std::apply(kernel, parameters); };
#if defined(__SANITIZE_THREAD__)
  launching_thread.tsan_fiber = __tsan_get_current_fiber();
#endif
  launching_thread.stack = nullptr;
  for (Unit& each : units) prepare_unit(each);
  unsigned turn = 0;
  for (const uint3 index : order_of_blocks(grid)) {
    unit = &units[turn++ % kUnits];
    run_block(index);
  }
  for (Unit& each : units) acquire(&each.end);
}

}  // namespace cuda_host
