// The meaning of csrc/common/ptx_sm90.cuh's functions in C++.
//
// What runs beside the threads, the tensor memory accelerator and each warpgroup's tensor cores,
// has an order of its own: a copy lands and a product is computed at the last moment that the
// kernel allows, or at once ("early"), and ThreadSanitizer sees each unit as a thread, which only
// mbarriers and waits order with the others. A fence is asked for before every group of products,
// even one whose accumulators are the last group's, which a GPU does without.
//
// Reference: PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution/
#pragma once

#include <map>

#include <cuda.h>

#include "collectives.h"
#include "ptx_host.h"

namespace cuda_host {

constexpr unsigned kGroup = 128;  // threads of a warpgroup

// A unit that accesses memory by itself.
class Engine {
 public:
  template <class Work>
  void run([[maybe_unused]] Work work) {
#if defined(__SANITIZE_THREAD__)
    constexpr unsigned kNoSynchronisation = 1;
    if (fiber_ == nullptr) fiber_ = __tsan_create_fiber(0);
    __tsan_switch_to_fiber(fiber_, kNoSynchronisation);
    work();
    __tsan_switch_to_fiber(current->tsan_fiber, kNoSynchronisation);
#else
    work();
#endif
  }

 private:
  [[maybe_unused]] void* fiber_ = nullptr;
};

struct Mbarrier {
  unsigned expected = 0;  // arrivals of a phase
  unsigned left = 0;
  int64_t bytes = 0;  // announced and not there yet
  unsigned phase = 0;
  bool is_visible = false;  // to the units that complete copies
  std::vector<Thread*> waiting;
  char order[2];  // by the phase's parity
};

// What an encoded tensor map holds here.
struct TensorMap {
  const unsigned char* data;
  uint64_t columns;
  uint64_t rows;
  uint64_t stride;
  unsigned box_columns;
  unsigned box_rows;
  unsigned swizzled_units;  // of 16 bytes, in a row
  unsigned magic;
};
constexpr unsigned kTensorMapMagic = 0x7E50A3A9;
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

struct TileCopy {
  uint32_t destination;
  uint32_t barrier;
  TensorMap map;
  int64_t x;
  int64_t y;
};

struct Product {
  uint64_t a;
  uint64_t b;
  const uint32_t* a_registers[kGroup];  // null: a is a descriptor
  float* d[kGroup];
  float (*widen)(uint32_t);
  bool adds;
  bool a_is_outer;
  bool b_is_outer;
  int columns;
};

struct Warpgroup {
  unsigned arrived = 0;
  const char* what = nullptr;
  void* operands[kGroup];
  bool fenced[kGroup] = {};
  std::vector<Product> open;
  std::vector<std::vector<Product>> groups;
  Engine tensor_core;
  char issued;
  char computed;
};

struct Hopper {
  std::map<uint32_t, Mbarrier> mbarriers;
  std::vector<TileCopy> copies;  // issued and under way
  Engine accelerator;
  char issued;
  Warpgroup warpgroups[kMaxThreads / kGroup];

  void reset() {
    mbarriers.clear();
    copies.clear();
    for (Warpgroup& each : warpgroups) {
      each.arrived = 0;
      each.open.clear();
      each.groups.clear();
      std::fill_n(each.fenced, kGroup, false);
    }
  }
};

inline Hopper hoppers[kUnits];
inline Hopper& hopper() { return hoppers[unit - units]; }
// ---- mbarrier ----------------------------------------------------------------------------------

// In the barrier's own memory, where a stray write would destroy it.
constexpr uint64_t kMbarrierBits = 0x5AFE0BA221E20A11;

inline Mbarrier& mbarrier_at(uint32_t address, const char* what) {
  uint64_t bits;
  memcpy(&bits, shared_pointer(address), sizeof(bits));
  const auto found = hopper().mbarriers.find(address);
  if (found == hopper().mbarriers.end())
    fail("%s: there is no mbarrier at shared address %u", what, address);
  if (bits != kMbarrierBits)
    fail("%s: the mbarrier at shared address %u was overwritten", what, address);
  return found->second;
}

inline void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.left != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.left = barrier.expected;
  ++progress;
  std::vector<Thread*> waiting = std::exchange(barrier.waiting, {});
  std::sort(waiting.begin(), waiting.end(),
            [](const Thread* a, const Thread* b) { return a->linear < b->linear; });
  wake(static_cast<unsigned>(waiting.size()), [&](unsigned i) { return waiting[i]; });
}

inline void arrive(uint32_t address, int64_t bytes, const char* what) {
  Unobserved rig;
  Mbarrier& barrier = mbarrier_at(address, what);
  if (barrier.left == 0) fail("%s: more arrivals than the mbarrier expects", what);
  release(&barrier.order[barrier.phase % 2]);
  barrier.bytes += bytes;
  --barrier.left;
  ++progress;
  end_phase_if_complete(barrier);
}

// ---- Tensor memory accelerator -----------------------------------------------------------------

inline uint32_t swizzled(uint32_t address, unsigned units) {
  return address ^ (address >> 7 & (units - 1)) << 4;
}

inline void land(const TileCopy& copy) {
  hopper().accelerator.run([&copy] {
    acquire(&hopper().issued);
    const TensorMap& map = copy.map;
    for (unsigned row = 0; row < map.box_rows; ++row)
      for (unsigned column = 0; column < map.box_columns; ++column) {
        const int64_t x = copy.x + column;
        const int64_t y = copy.y + row;
        const bool is_inside = x >= 0 && y >= 0 && x < static_cast<int64_t>(map.columns) &&
                               y < static_cast<int64_t>(map.rows);
        uint16_t element = 0;
        if (is_inside) memcpy(&element, map.data + y * map.stride + x * 2, 2);
        const uint32_t offset = (row * map.box_columns + column) * 2;
        memcpy(shared_pointer(swizzled(copy.destination + offset, map.swizzled_units)), &element,
               2);
      }
    Unobserved rig;
    Mbarrier& barrier = mbarrier_at(copy.barrier, "cp.async.bulk.tensor");
    release(&barrier.order[barrier.phase % 2]);
    barrier.bytes -= int64_t{map.box_rows} * map.box_columns * 2;
    ++progress;
    end_phase_if_complete(barrier);
  });
}

// Lands one of the copies under way; whichever, when the schedule is random.
inline bool land_one() {
  TileCopy copy;
  {
    Unobserved rig;
    std::vector<TileCopy>& copies = hopper().copies;
    if (copies.empty()) return false;
    const size_t which = schedule.order == Order::kRandom ? random_number() % copies.size() : 0;
    copy = copies[which];
    copies.erase(copies.begin() + which);
  }
  land(copy);
  return true;
}

inline const bool is_installed = [] {
  at_block_start.push_back([] { hopper().reset(); });
  when_nobody_is_ready.push_back(&land_one);
  at_block_end.push_back([] {
    if (!hopper().copies.empty()) fail("the block has ended before its copies");
  });
  return true;
}();

// The driver's cuTensorMapEncodeTiled, for matrices.
inline CUresult encode_tensor_map(CUtensorMap* encoded, CUtensorMapDataType, cuuint32_t rank,
                                  void* data, const cuuint64_t* sizes, const cuuint64_t* strides,
                                  const cuuint32_t* box, const cuuint32_t*, CUtensorMapInterleave,
                                  CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                  CUtensorMapFloatOOBfill) {
  const unsigned units = swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 8
                         : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 4
                                                                : 2;
  const bool is_valid = rank == 2 && reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                        strides[0] % 16 == 0 && sizes[0] > 0 && sizes[1] > 0 && box[1] > 0 &&
                        box[1] <= 256 && box[0] * 2 == units * 16;
  if (!is_valid) return CUDA_ERROR_INVALID_VALUE;
  const TensorMap map{static_cast<const unsigned char*>(data),
                      sizes[0],
                      sizes[1],
                      strides[0],
                      box[0],
                      box[1],
                      units,
                      kTensorMapMagic};
  memset(encoded, 0, sizeof(*encoded));
  memcpy(encoded, &map, sizeof(map));
  return CUDA_SUCCESS;
}

// ---- Warpgroups --------------------------------------------------------------------------------

inline Warpgroup& warpgroup() { return hopper().warpgroups[current->linear / kGroup]; }

// All threads of a warpgroup meet; the last one calls work(operands).
template <class Operand, class Work>
void meet_warpgroup(const char* what, Operand& operand, Work work) {
  Unobserved rig;
  Warpgroup& group = warpgroup();
  const unsigned first = current->linear / kGroup * kGroup;
  if (first + kGroup > num_threads) fail("%s: the warpgroup has less than 128 threads", what);
  for (unsigned warp = first / 32; warp < first / 32 + 4; ++warp)
    if (exited_lanes[warp] != 0) fail("%s: threads of the warpgroup have returned", what);
  if (group.arrived != 0 && strcmp(group.what, what) != 0)
    fail("%s: threads of the same warpgroup wait in %s", what, group.what);
  group.what = what;
  group.operands[current->linear - first] = &operand;
  ++progress;
  if (++group.arrived < kGroup) {
    wait(what);
    return;
  }
  group.arrived = 0;
  Operand* operands[kGroup];
  for (unsigned i = 0; i < kGroup; ++i) operands[i] = static_cast<Operand*>(group.operands[i]);
  work(operands);
  wake(kGroup, [&](unsigned i) {
    Thread* thread = thread_of(first + i);
    return thread == current ? nullptr : thread;
  });
}

// Where element (i, k) of an operand is, i counting along M or N.
inline uint32_t operand_address(uint64_t descriptor, bool is_outer, unsigned i, unsigned k) {
  const auto field = [descriptor](int shift) {
    return static_cast<uint32_t>(descriptor >> shift & 0x3FFF) << 4;
  };
  const unsigned mode = descriptor >> 62;
  if (mode == 0 || (descriptor >> 49 & 7) != 0)
    fail("wgmma: a descriptor without swizzle, or with a base offset, is not modelled");
  const unsigned units = 16u >> mode;  // of 16 bytes, in a row
  const unsigned row_bytes = units * 16;
  const uint32_t start = field(0);
  const uint32_t leading = field(16);
  const uint32_t stride = field(32);
  const uint32_t address = is_outer ? start + k / 8 * stride + k % 8 * row_bytes +
                                          i / (units * 8) * leading + i % (units * 8) * 2
                                    : start + i / 8 * stride + i % 8 * row_bytes + k * 2;
  return swizzled(address, units);
}

inline void compute(const Product& product) {
  const auto load = [&product](uint64_t descriptor, bool is_outer, unsigned i, unsigned k) {
    uint16_t bits;
    memcpy(&bits, shared_pointer(operand_address(descriptor, is_outer, i, k)), 2);
    return product.widen(bits);
  };
  static float a[64][16];
  static float b[16][256];
  static float d[64][256];
  for (unsigned m = 0; m < 64; ++m)
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned thread = m / 16 * 32 + m % 8 * 4 + k % 8 / 2;
      const uint32_t* registers = product.a_registers[thread];
      const float value =
          registers == nullptr
              ? load(product.a, product.a_is_outer, m, k)
              : product.widen(registers[m % 16 / 8 + k / 8 * 2] >> (16 * (k % 2)) & 0xFFFFu);
      Unobserved rig;
      a[m][k] = value;
    }
  for (int n = 0; n < product.columns; ++n)
    for (unsigned k = 0; k < 16; ++k) {
      const float value = load(product.b, product.b_is_outer, n, k);
      Unobserved rig;
      b[k][n] = value;
    }
  {
    Unobserved rig;
    for (int m = 0; m < 64; ++m) {
      std::fill_n(d[m], product.columns, 0.0f);
      for (int k = 0; k < 16; ++k)
        for (int n = 0; n < product.columns; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < product.columns; ++n) {
      float* held =
          product.d[m / 16 * 32 + m % 8 * 4 + n % 8 / 2] + n / 8 * 4 + m % 16 / 8 * 2 + n % 2;
      *held = product.adds ? *held + d[m][n] : d[m][n];
    }
}

inline void compute_all(std::vector<Product>& products) {
  Warpgroup& group = warpgroup();
  group.tensor_core.run([&] {
    acquire(&group.issued);
    for (const Product& product : products) compute(product);
    release(&group.computed);
  });
  products.clear();
}

struct ProductOperand {
  uint64_t a;
  uint64_t b;
  const uint32_t* a_registers;
  float* d;
  bool adds;
};

inline void issue(ProductOperand operand, float (*widen)(uint32_t), bool a_is_outer,
                  bool b_is_outer, int columns) {
  Warpgroup& group = warpgroup();
  if (!group.fenced[current->linear % kGroup]) fail("wgmma: no wgmma.fence since the last group");
  release(&group.issued);
  meet_warpgroup("wgmma", operand, [&](ProductOperand** lanes) {
    const ProductOperand& first = *lanes[0];
    Product product{first.a, first.b, {}, {}, widen, first.adds, a_is_outer, b_is_outer, columns};
    for (unsigned i = 0; i < kGroup; ++i) {
      const ProductOperand& each = *lanes[i];
      if (each.a != first.a || each.b != first.b || each.adds != first.adds)
        fail("wgmma: threads of the warpgroup have different operands");
      product.a_registers[i] = each.a_registers;
      product.d[i] = each.d;
    }
    warpgroup().open.push_back(product);
    if (!schedule.late) compute_all(warpgroup().open);
  });
}

template <int kRegisters>
void set_registers(const char* what) {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0);
  int nothing = 0;
  meet_warpgroup(what, nothing, [](int**) {});
}

}  // namespace cuda_host

namespace fused_attn::ptx {

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  Unobserved rig;
  if (barrier % 8 != 0) fail("mbarrier.init: misaligned shared address %u", barrier);
  if (arrivals == 0) fail("mbarrier.init: nobody is expected");
  memcpy(cuda_host::shared_pointer(barrier), &cuda_host::kMbarrierBits, 8);
  cuda_host::hopper().mbarriers[barrier] = {arrivals, arrivals};
}

inline void mbarrier_init_fence() {
  Unobserved rig;
  for (auto& [address, barrier] : cuda_host::hopper().mbarriers) barrier.is_visible = true;
}

inline void mbarrier_arrive(uint32_t barrier) { cuda_host::arrive(barrier, 0, "mbarrier.arrive"); }

inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  cuda_host::arrive(barrier, bytes, "mbarrier.arrive.expect_tx");
}

inline void mbarrier_wait(uint32_t address, uint32_t parity) {
  constexpr const char* kWhat = "mbarrier.try_wait";
  if (cuda_host::schedule.order == cuda_host::Order::kRandom && cuda_host::random_number() % 8 == 0)
    cuda_host::land_one();
  Unobserved rig;
  cuda_host::Mbarrier& barrier = cuda_host::mbarrier_at(address, kWhat);
  // The phase under way has the other parity.
  while (barrier.phase % 2 == (parity & 1)) {
    barrier.waiting.push_back(current);
    cuda_host::wait(kWhat);
  }
  cuda_host::acquire(&barrier.order[parity & 1]);
}

inline void tma_load_2d(uint32_t destination, const CUtensorMap* map, uint32_t barrier, int x,
                        int y) {
  cuda_host::TileCopy copy{destination, barrier, {}, x, y};
  memcpy(&copy.map, map, sizeof(copy.map));
  {
    Unobserved rig;
    if (copy.map.magic != cuda_host::kTensorMapMagic)
      fail("cp.async.bulk.tensor: this is no tensor map");
    if (destination % 1024 != 0)
      fail("cp.async.bulk.tensor: shared address %u is no multiple of 1024", destination);
    if (!cuda_host::mbarrier_at(barrier, "cp.async.bulk.tensor").is_visible)
      fail("cp.async.bulk.tensor: no fence since the mbarrier was made");
  }
  cuda_host::release(&cuda_host::hopper().issued);
  if (!cuda_host::schedule.late) return cuda_host::land(copy);
  Unobserved rig;
  cuda_host::hopper().copies.push_back(copy);
}

template <int kRegisters>
void raise_registers() {
  cuda_host::set_registers<kRegisters>("setmaxnreg.inc");
}
template <int kRegisters>
void lower_registers() {
  cuda_host::set_registers<kRegisters>("setmaxnreg.dec");
}

inline void wgmma_fence() {
  Unobserved rig;
  cuda_host::warpgroup().fenced[current->linear % cuda_host::kGroup] = true;
}

inline void wgmma_commit() {
  int nothing = 0;
  cuda_host::meet_warpgroup("wgmma.commit_group", nothing, [](int**) {
    cuda_host::Warpgroup& group = cuda_host::warpgroup();
    group.groups.push_back(std::exchange(group.open, {}));
    std::fill_n(group.fenced, cuda_host::kGroup, false);
  });
}

template <int kPending>
void wgmma_wait() {
  int nothing = 0;
  cuda_host::meet_warpgroup("wgmma.wait_group", nothing, [](int**) {
    auto& groups = cuda_host::warpgroup().groups;
    while (groups.size() > kPending) {
      cuda_host::compute_all(groups.front());
      groups.erase(groups.begin());
    }
  });
  cuda_host::acquire(&cuda_host::warpgroup().computed);
}

template <int kCount>
void wgmma_hold(float (&)[kCount]) {}

template <class T, int kN, Major kA, Major kB>
void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool adds) {
  static_assert(kN == 64 || kN == 128 || kN == 256);
  cuda_host::issue({a, b, nullptr, d, adds}, &widen<T>, kA == Major::kOuter, kB == Major::kOuter,
                   kN);
}

template <class T, int kN, Major kB>
void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool adds) {
  static_assert(kN == 64 || kN == 128 || kN == 256);
  cuda_host::issue({0, b, a, d, adds}, &widen<T>, false, kB == Major::kOuter, kN);
}

}  // namespace fused_attn::ptx
