// What large outputs gain from: huge pages under them, and stores past the caches.
#pragma once

#include <ATen/core/Tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_attn {

// Asks for huge pages under a tensor that was just allocated. A large tensor is often memory fresh
// from the system, and a kernel that writes it then waits for the system to zero it page by page:
// with pages of 4 KiB that takes several times as long as the kernel itself. Where the memory is
// in use already, or the system has its own mind, nothing changes.
inline at::Tensor in_huge_pages(at::Tensor tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + tensor.nbytes()) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

// Whether `stream_lanes` may write the rows of an output, and should: it is as large as third-level
// caches are, so that its beginning would be gone when somebody reads it. (What the system says of
// the cache is no help: a virtual machine may see the caches of a whole socket.)
inline bool should_stream(const at::Tensor& output) {
  constexpr uintptr_t kLine = 64;
  constexpr size_t kCache = size_t{32} << 20;
  return output.nbytes() > kCache && output.size(-1) * output.itemsize() % kLine == 0 &&
         reinterpret_cast<uintptr_t>(output.const_data_ptr()) % kLine == 0;
}

}  // namespace fused_attn
