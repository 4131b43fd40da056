// Memory for one task of a CPU kernel, aligned to a cache line: a vector load that crosses two
// lines costs as much as two.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace fused_attn {

template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(count), kAlignment))) {
  }
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* data() { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

}  // namespace fused_attn
