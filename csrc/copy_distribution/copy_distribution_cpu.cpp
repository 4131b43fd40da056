// Unpacks tensors for the CPU kernels of copy_distribution and spreads rows over threads.
#include "copy_distribution/copy_distribution.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "common/dispatch.h"
#include "common/large_outputs.h"

namespace fused_attn {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

const int64_t* integers(const Optional& given, Tensor& keep_alive) {
  if (!given) return nullptr;
  keep_alive = given->to(at::kLong).contiguous();
  return keep_alive.const_data_ptr<int64_t>();
}

// The call's tensors as kernels read them, and what owns them.
struct Call {
  Call(const Tensor& logits, const Tensor& copy, const Tensor& source_tokens, const Optional& gate,
       const Optional& source_lengths, const Optional& targets, int64_t ignore_index)
      : rows(logits.numel() / logits.size(-1)) {
    p.logits = strided_rows(logits, owners[0]);
    p.copy = strided_rows(copy.to(at::kFloat), owners[1]);
    p.tokens = strided_rows(source_tokens.expand(copy.sizes()), owners[2]);
    p.gate = parameter(gate, owners[3]);
    p.lengths = integers(source_lengths, owners[4]);
    p.rows_per_length = rows / std::max<int64_t>(logits.size(0), 1);
    p.targets = integers(targets, owners[5]);
    p.ignore_index = ignore_index;
    p.vocabulary = logits.size(-1);
    p.positions = copy.size(-1);
    p.dtype = kernel_dtype(logits.scalar_type());
  }

  int64_t rows;
  CopyDistribution p{};
  Tensor owners[6];
};

std::tuple<Tensor, Tensor> copy_distribution_forward_cpu(
    const Tensor& logits, const Tensor& copy, const Tensor& source_tokens, const Optional& gate,
    const Optional& source_lengths, const Optional& targets, int64_t extended_size,
    int64_t ignore_index) {
  Call call(logits, copy, source_tokens, gate, source_lengths, targets, ignore_index);
  TORCH_CHECK(extended_size >= call.p.vocabulary,
              "copy_distribution: extended_size below the vocabulary's");
  call.p.extended_size = extended_size;
  const auto fp32 = logits.options().dtype(at::kFloat);
  std::vector<int64_t> sizes(logits.sizes().begin(), logits.sizes().end() - 1);
  Tensor lse = at::empty(sizes, fp32);
  if (!targets) sizes.push_back(extended_size);
  Tensor output = in_huge_pages(at::empty(sizes, fp32));

  CopyDistributionForward p{};
  p.call = call.p;
  p.output = output.mutable_data_ptr<float>();
  p.lse = lse.mutable_data_ptr<float>();
  p.streams = !targets && should_stream(output);
  at::parallel_for(0, call.rows, task_grain(call.p.vocabulary), [&](int64_t begin, int64_t end) {
    FUSED_ATTN_CALL_KERNEL(copy_distribution_forward, p, begin, end);
  });
  return {output, lse};
}

std::tuple<Tensor, Tensor, Tensor> copy_distribution_backward_cpu(
    const Tensor& grad_output, const Tensor& logits, const Tensor& copy,
    const Tensor& source_tokens, const Optional& gate, const Optional& source_lengths,
    const Optional& targets, const Tensor& lse, int64_t ignore_index) {
  Call call(logits, copy, source_tokens, gate, source_lengths, targets, ignore_index);
  const auto fp32 = logits.options().dtype(at::kFloat);
  Tensor grad_logits = in_huge_pages(at::empty(logits.sizes(), logits.options()));
  Tensor grad_copy = at::empty(copy.sizes(), fp32);
  Tensor grad_gate = gate ? at::empty(gate->sizes(), fp32) : at::empty({0}, fp32);

  CopyDistributionBackward p{};
  Tensor owners[2];
  if (targets) {
    p.grad_nll = parameter(grad_output, owners[0]);
  } else {
    call.p.extended_size = grad_output.size(-1);
    p.grad_output = strided_rows(grad_output, owners[0]);
  }
  p.call = call.p;
  p.lse = parameter(lse, owners[1]);
  p.grad_logits = grad_logits.mutable_data_ptr();
  p.grad_copy = grad_copy.mutable_data_ptr<float>();
  p.grad_gate = gate ? grad_gate.mutable_data_ptr<float>() : nullptr;
  p.streams = should_stream(grad_logits);
  at::parallel_for(0, call.rows, task_grain(call.p.vocabulary), [&](int64_t begin, int64_t end) {
    FUSED_ATTN_CALL_KERNEL(copy_distribution_backward, p, begin, end);
  });
  return {grad_logits, grad_copy, grad_gate};
}

}  // namespace
}  // namespace fused_attn

TORCH_LIBRARY_IMPL(fused_attn_C, CPU, m) {
  m.impl("copy_distribution_forward", &fused_attn::copy_distribution_forward_cpu);
  m.impl("copy_distribution_backward", &fused_attn::copy_distribution_backward_cpu);
}
