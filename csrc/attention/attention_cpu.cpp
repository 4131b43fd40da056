// Unpacks tensors for the CPU kernels of attention and spreads tasks over threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "attention/attention.h"
#include "common/dispatch.h"

namespace fused_attn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Fewer (batch, head) pairs than this are split into chunks of rows, of at least so many. Neither
// depends on the number of threads, so that sums over chunks are the same bits on any machine.
constexpr int64_t kManyGroups = 16;
constexpr int64_t kChunkRows = 192;

// The vectors of the widest instruction set.
constexpr int64_t kMaxLanes = 16;

HeadRows head_rows(const Tensor& tensor, Tensor& keep_alive) {
  const bool contiguous_rows = tensor.size(3) <= 1 || tensor.stride(3) == 1;
  keep_alive = contiguous_rows ? tensor : tensor.contiguous();
  return {keep_alive.const_data_ptr(), keep_alive.stride(0), keep_alive.stride(1),
          keep_alive.stride(2)};
}

PairTensor pair_strides(const Tensor& tensor) {
  int64_t strides[4] = {0, 0, 0, 0};
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) != 1) strides[4 - tensor.dim() + d] = tensor.stride(d);
  return {nullptr, DType::kFloat32, strides[0], strides[1], strides[2], strides[3]};
}

// The kernel's parameters, and the tensors that they point to.
struct Call {
  Call(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask,
       const OptionalTensor& bias, const OptionalTensor& query_lengths_,
       const OptionalTensor& key_lengths_, bool is_causal, double scale) {
    in.heads = query.size(1);
    in.queries = query.size(2);
    in.keys = key.size(2);
    in.head_size = query.size(3);
    in.value_size = value.size(3);
    TORCH_CHECK(in.head_size <= kMaxHeadSize && in.value_size <= kMaxHeadSize,
                "attention: the cpu kernels take head sizes up to ", kMaxHeadSize);
    in.q = head_rows(query, q);
    in.k = head_rows(key, k);
    in.v = head_rows(value, v);
    in.scale = static_cast<float>(scale);
    in.is_causal = is_causal;
    in.dtype = kernel_dtype(query.scalar_type());
    if (mask) {
      in.mask = pair_strides(*mask);
      in.mask.data = mask->const_data_ptr();
    }
    if (bias) {
      in.bias = pair_strides(*bias);
      in.bias.data = bias->const_data_ptr();
      in.bias.dtype = kernel_dtype(bias->scalar_type());
    }
    in.query_lengths = lengths(query_lengths_, in.queries, query_lengths);
    in.key_lengths = lengths(key_lengths_, in.keys, key_lengths);
  }

  static const int64_t* lengths(const OptionalTensor& given, int64_t most, Tensor& owner) {
    if (!given) return nullptr;
    owner = given->to(at::kLong).clamp(0, most).contiguous();
    return owner.const_data_ptr<int64_t>();
  }

  AttentionInputs in{};
  Tensor q, k, v, query_lengths, key_lengths;
};

struct Plan {
  std::vector<int64_t> heads;
  std::vector<AttentionTask> tasks;
  int64_t chunks;
};

// One task a group of (batch, head) pairs and chunk of rows, those with most to do first.
// `group_of(b, h)` numbers groups from 0.
template <typename Group>
Plan make_plan(const AttentionInputs& in, int64_t batch, int64_t groups, Group&& group_of) {
  Plan plan;
  plan.chunks = 1;
  if (groups < kManyGroups)
    plan.chunks = std::clamp<int64_t>(in.queries / kChunkRows, 1,
                                      (kManyGroups + groups - 1) / std::max<int64_t>(groups, 1));
  std::vector<std::vector<int64_t>> members(groups);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < in.heads; ++h) members[group_of(b, h)].push_back(b * in.heads + h);
  std::vector<std::pair<double, AttentionTask>> weighted;
  for (const auto& group : members) {
    const int64_t first = static_cast<int64_t>(plan.heads.size());
    plan.heads.insert(plan.heads.end(), group.begin(), group.end());
    for (int64_t c = 0; c < plan.chunks; ++c) {
      const int64_t begin = in.queries * c / plan.chunks;
      const int64_t end = in.queries * (c + 1) / plan.chunks;
      double work = 0.0;
      for (const int64_t head : group) {
        const int64_t b = head / in.heads;
        const int64_t rows =
            std::clamp(in.query_lengths ? in.query_lengths[b] : in.queries, begin, end);
        double keys = static_cast<double>(in.key_lengths ? in.key_lengths[b] : in.keys);
        if (in.is_causal) keys = std::min(keys, static_cast<double>(begin + rows) / 2.0);
        work += static_cast<double>(rows - begin) * keys;
      }
      weighted.push_back(
          {work, {first, first + static_cast<int64_t>(group.size()), begin, end, c}});
    }
  }
  std::stable_sort(weighted.begin(), weighted.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  for (const auto& [work, task] : weighted) plan.tasks.push_back(task);
  return plan;
}

template <typename Kernel>
void run_tasks(const Plan& plan, Kernel&& kernel) {
  AttentionTasks tasks{plan.tasks.data(), static_cast<int64_t>(plan.tasks.size()),
                       plan.heads.data()};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks.count);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) kernel(tasks);
  });
}

std::tuple<Tensor, Tensor> attention_forward_cpu(const Tensor& query, const Tensor& key,
                                                 const Tensor& value, const OptionalTensor& mask,
                                                 const OptionalTensor& bias,
                                                 const OptionalTensor& query_lengths,
                                                 const OptionalTensor& key_lengths, bool is_causal,
                                                 double scale) {
  const int64_t B = query.size(0), H = query.size(1), T = query.size(2);
  Tensor output = at::empty({B, H, T, value.size(3)}, query.options());
  Tensor lse = at::empty({B, H, T}, query.options().dtype(at::kFloat));
  const Call call(query, key, value, mask, bias, query_lengths, key_lengths, is_causal, scale);
  AttentionForward p{};
  p.in = call.in;
  p.output = output.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  const Plan plan = make_plan(p.in, B, B * H, [&](int64_t b, int64_t h) { return b * H + h; });
  run_tasks(plan,
            [&](AttentionTasks& tasks) { FUSED_ATTN_CALL_KERNEL(attention_forward, p, tasks); });
  return {output, lse};
}

// The sum over chunks, in their order, without the padding.
Tensor finish_sum(Tensor partial, int64_t width, at::ScalarType dtype) {
  Tensor sum = partial.select(0, 0);
  for (int64_t c = 1; c < partial.size(0); ++c) sum.add_(partial.select(0, c));
  return sum.narrow(-1, 0, width).to(dtype).contiguous();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward_cpu(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& mask, const OptionalTensor& bias, const OptionalTensor& query_lengths,
    const OptionalTensor& key_lengths, const Tensor& output, const Tensor& lse, bool is_causal,
    double scale, bool need_grad_bias) {
  const int64_t B = query.size(0), H = query.size(1), D = query.size(3);
  const int64_t S = key.size(2), Dv = value.size(3);
  const auto fp32 = query.options().dtype(at::kFloat);
  const Call call(query, key, value, mask, bias, query_lengths, key_lengths, is_causal, scale);
  Tensor grad_output_owner;
  const Tensor output_rows = output.contiguous();
  const Tensor lse_rows = lse.contiguous();
  Tensor dq = at::empty(query.sizes(), query.options());
  AttentionBackward p{};
  p.in = call.in;
  p.grad_output = head_rows(grad_output, grad_output_owner);
  p.output = output_rows.const_data_ptr();
  p.lse = lse_rows.const_data_ptr<float>();
  p.dq = dq.mutable_data_ptr();
  p.chunk_heads = B * H;

  // (batch, head) pairs that share a slice of the bias share its gradient, so they are one group.
  const bool by_batch = !need_grad_bias || (bias->dim() == 4 && bias->size(0) != 1);
  const bool by_head = !need_grad_bias || (bias->dim() >= 3 && bias->size(-3) != 1);
  const int64_t groups = B * H == 0 ? 0 : (by_batch ? B : 1) * (by_head ? H : 1);
  const Plan plan = make_plan(p.in, B, groups, [&](int64_t b, int64_t h) {
    return (by_batch ? b : 0) * (by_head ? H : 1) + (by_head ? h : 0);
  });

  p.dk_stride = (D + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
  p.dv_stride = (Dv + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
  Tensor dk = at::empty({plan.chunks, B, H, S, p.dk_stride}, fp32);
  Tensor dv = at::empty({plan.chunks, B, H, S, p.dv_stride}, fp32);
  p.dk = dk.mutable_data_ptr<float>();
  p.dv = dv.mutable_data_ptr<float>();
  Tensor dbias = at::empty({0}, fp32);
  if (need_grad_bias) {
    // Chunks own rows of the gradient unless it is the same for all rows.
    const bool by_row = bias->dim() >= 2 && bias->size(-2) != 1;
    std::vector<int64_t> shape = bias->sizes().vec();
    shape.insert(shape.begin(), by_row ? 1 : plan.chunks);
    dbias = at::zeros(shape, fp32);
    p.dbias = dbias.mutable_data_ptr<float>();
    p.dbias_strides = pair_strides(dbias.select(0, 0));
    p.dbias_chunk_stride = by_row ? 0 : bias->numel();
  }
  run_tasks(plan,
            [&](AttentionTasks& tasks) { FUSED_ATTN_CALL_KERNEL(attention_backward, p, tasks); });
  if (need_grad_bias) {
    Tensor sum = dbias.select(0, 0);
    for (int64_t c = 1; c < dbias.size(0); ++c) sum.add_(dbias.select(0, c));
    dbias = sum.to(bias->scalar_type());
  }
  const auto dtype = query.scalar_type();
  return {dq, finish_sum(dk, D, dtype), finish_sum(dv, Dv, dtype), dbias};
}

}  // namespace
}  // namespace fused_attn

TORCH_LIBRARY_IMPL(fused_attn_C, CPU, m) {
  m.impl("attention_forward", &fused_attn::attention_forward_cpu);
  m.impl("attention_backward", &fused_attn::attention_backward_cpu);
}
