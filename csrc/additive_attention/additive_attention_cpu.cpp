// Unpacks tensors for the CPU kernels of additive_attention and spreads tasks over threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>

#include "additive_attention/additive_attention.h"
#include "common/dispatch.h"
#include "common/large_outputs.h"

namespace fused_attn {
namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Gradients of parameters are summed in at most so many chunks of the batch.
constexpr int64_t kMostChunks = 8;

// Pairs and columns that are not worth waking another thread for.
constexpr int64_t kSmallWork = 4096;

SequenceRows sequence_rows(const Tensor& tensor, Tensor& keep_alive) {
  const bool contiguous_rows = tensor.size(3) <= 1 || tensor.stride(3) == 1;
  keep_alive = contiguous_rows ? tensor : tensor.contiguous();
  return {keep_alive.const_data_ptr(), keep_alive.stride(0), keep_alive.stride(1),
          keep_alive.stride(2)};
}

// The kernels' parameters, and the memory that they point to.
struct Call {
  Call(const Tensor& query, const Tensor& key, const MaybeTensor& value, const Tensor& score_weight,
       const MaybeTensor& features, const MaybeTensor& feature_weight, const MaybeTensor& mask,
       const MaybeTensor& key_lengths) {
    in.batch = query.size(0);
    in.heads = query.size(1);
    in.queries = query.size(2);
    in.size = query.size(3);
    in.keys = key.size(2);
    in.dtype = kernel_dtype(query.scalar_type());
    in.q = sequence_rows(query, q);
    in.k = sequence_rows(key, k);
    if (value) {
      in.v = sequence_rows(*value, v);
      in.value_size = value->size(3);
    }
    in.score_weight = parameter(score_weight, weight);
    TORCH_CHECK(features.has_value() == feature_weight.has_value(),
                "additive_attention: features and feature_weight go together");
    if (features) {
      in.features = {features->const_data_ptr(), features->stride(0), features->stride(1),
                     features->stride(2),        features->stride(3), features->stride(4)};
      in.features_size = features->size(4);
      in.feature_weight = parameter(feature_weight, weights_of_features);
    }
    if (mask) {
      int64_t strides[4] = {0, 0, 0, 0};
      for (int64_t d = 0; d < mask->dim(); ++d)
        if (mask->size(d) != 1) strides[4 - mask->dim() + d] = mask->stride(d);
      in.mask = {static_cast<const uint8_t*>(mask->const_data_ptr()), strides[0], strides[1],
                 strides[2], strides[3]};
    }
    if (key_lengths) {
      lengths = key_lengths->to(at::kLong).clamp(0, in.keys).contiguous();
      in.key_lengths = lengths.const_data_ptr<int64_t>();
    }
    // Rows that take no part are not written.
    writes_all_rows = !mask && !key_lengths && in.queries > 0 && in.keys > 0;
  }

  Tensor gradient(const MaybeTensor& like, bool needed) const {
    if (!like || !needed) return at::empty({0}, q.options());
    return writes_all_rows ? in_huge_pages(at::empty(like->sizes(), q.options()))
                           : at::zeros(like->sizes(), q.options());
  }

  // Tasks of `columns` columns for each of `pairs` pairs that a thread takes at least.
  static int64_t grain(int64_t pairs, int64_t columns) {
    return std::max<int64_t>(1, kSmallWork / std::max<int64_t>(pairs * columns, 1));
  }

  AdditiveInputs in{};
  bool writes_all_rows;
  Tensor q, k, v, weight, weights_of_features, lengths;
};

std::tuple<Tensor, Tensor> additive_attention_forward_cpu(
    const Tensor& query, const Tensor& key, const MaybeTensor& value, const Tensor& score_weight,
    const MaybeTensor& features, const MaybeTensor& feature_weight, const MaybeTensor& mask,
    const MaybeTensor& key_lengths) {
  const Call call(query, key, value, score_weight, features, feature_weight, mask, key_lengths);
  const AdditiveInputs& in = call.in;
  Tensor context = value
                       ? at::empty({in.batch, in.heads, in.queries, in.value_size}, query.options())
                       : at::empty({0}, query.options());
  Tensor weights =
      at::empty({in.batch, in.heads, in.queries, in.keys}, query.options().dtype(at::kFloat));
  AdditiveForward p{};
  p.in = in;
  p.context = value ? context.mutable_data_ptr() : nullptr;
  p.weights = weights.mutable_data_ptr<float>();
  p.query_blocks = ceil_div(in.queries, kQueryBlock);
  const int64_t blocks = in.batch * in.heads * p.query_blocks;
  at::parallel_for(0, blocks, Call::grain(std::min(in.queries, kQueryBlock) * in.keys, in.size),
                   [&](int64_t begin, int64_t end) {
                     FUSED_ATTN_CALL_KERNEL(additive_attention_forward, p, begin, end);
                   });
  return {context, weights};
}

// One sum of fp32 from the chunks of a partial one.
Tensor sum_of_chunks(const Tensor& partial, int64_t chunks, at::IntArrayRef sizes) {
  if (chunks == 1) return partial.view(sizes);
  Tensor total = at::empty(sizes, partial.options());
  const int64_t columns = total.numel();
  const float* from = partial.const_data_ptr<float>();
  float* to = total.mutable_data_ptr<float>();
  at::parallel_for(0, columns, column_grain(chunks), [&](int64_t begin, int64_t end) {
    FUSED_ATTN_CALL_KERNEL(additive_attention_reduce, from, chunks, columns, to, begin, end);
  });
  return total;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients additive_attention_backward_cpu(const MaybeTensor& grad_context,
                                          const MaybeTensor& grad_weights, const Tensor& query,
                                          const Tensor& key, const MaybeTensor& value,
                                          const Tensor& score_weight, const MaybeTensor& features,
                                          const MaybeTensor& feature_weight,
                                          const MaybeTensor& mask, const MaybeTensor& key_lengths,
                                          const MaybeTensor& weights, std::array<bool, 6> needs) {
  TORCH_CHECK(weights.has_value() == value.has_value(),
              "additive_attention: the backward needs the weights where there are values");
  const Call call(query, key, value, score_weight, features, feature_weight, mask, key_lengths);
  const AdditiveInputs& in = call.in;
  const auto fp32 = query.options().dtype(at::kFloat);
  const int64_t heads = in.batch * in.heads;
  const bool needs_pairs = needs[0] || needs[1] || needs[3] || needs[4] || needs[5];

  Tensor grad_query = call.gradient(query, needs[0]);
  Tensor grad_key = call.gradient(key, needs[1]);
  // Without a gradient of the context nothing writes that of the values.
  Tensor grad_value = grad_context || !value || !needs[2]
                          ? call.gradient(value, needs[2])
                          : at::zeros(value->sizes(), query.options());
  Tensor grad_features = call.gradient(features, needs[4]);
  const int64_t chunks = std::clamp<int64_t>(in.batch, 1, kMostChunks);
  const auto partial_of = [&](const MaybeTensor& parameter, bool needed) {
    return at::empty({parameter && needed ? chunks * parameter->numel() : 0}, fp32);
  };
  Tensor partial_weight = partial_of(score_weight, needs[3]);
  Tensor partial_feature_weight = partial_of(feature_weight, needs[5]);
  Tensor grad_scores = at::empty({heads, in.queries * in.keys}, fp32);
  Tensor queries = at::empty({heads, in.queries}, query.options().dtype(at::kInt));
  Tensor keys = at::empty({heads, in.keys}, query.options().dtype(at::kInt));
  Tensor counts = at::empty({heads, 2}, query.options().dtype(at::kLong));

  AdditiveBackward p{};
  p.in = in;
  Tensor grad_context_owner, grad_weights_owner, weights_owner;
  if (grad_context) p.grad_context = sequence_rows(*grad_context, grad_context_owner);
  p.grad_weights = parameter(grad_weights, grad_weights_owner);
  p.weights = parameter(weights, weights_owner);
  const auto pointer = [](const Tensor& tensor, bool needed) {
    return needed ? tensor.mutable_data_ptr() : nullptr;
  };
  p.grad_query = pointer(grad_query, needs[0]);
  p.grad_key = pointer(grad_key, needs[1]);
  p.grad_value = pointer(grad_value, needs[2] && value.has_value());
  p.grad_features = pointer(grad_features, needs[4] && features.has_value());
  p.grad_score_weight = static_cast<float*>(pointer(partial_weight, needs[3]));
  p.grad_feature_weight =
      static_cast<float*>(pointer(partial_feature_weight, needs[5] && features.has_value()));
  p.chunk_batch = ceil_div(in.batch, chunks);
  p.grad_scores = grad_scores.mutable_data_ptr<float>();
  p.queries = queries.mutable_data_ptr<int32_t>();
  p.keys = keys.mutable_data_ptr<int32_t>();
  p.counts = counts.mutable_data_ptr<int64_t>();

  const int64_t pairs = in.queries * in.keys;
  at::parallel_for(0, heads, Call::grain(pairs, in.value_size + 1),
                   [&](int64_t begin, int64_t end) {
                     FUSED_ATTN_CALL_KERNEL(additive_attention_grad_scores, p, begin, end);
                   });
  if (needs_pairs && features) {
    at::parallel_for(0, chunks * in.heads, Call::grain(pairs * p.chunk_batch, in.size),
                     [&](int64_t begin, int64_t end) {
                       FUSED_ATTN_CALL_KERNEL(additive_attention_features_backward, p, begin, end);
                     });
  } else if (needs_pairs) {
    at::parallel_for(0, chunks * in.heads * ceil_div(in.size, kColumnGroup),
                     Call::grain(pairs * p.chunk_batch, kColumnGroup),
                     [&](int64_t begin, int64_t end) {
                       FUSED_ATTN_CALL_KERNEL(additive_attention_backward, p, begin, end);
                     });
  }
  const auto total_of = [&](const Tensor& partial, const MaybeTensor& parameter, bool needed) {
    if (!parameter || !needed) return at::empty({0}, fp32);
    return sum_of_chunks(partial, chunks, parameter->sizes());
  };
  return {grad_query,    grad_key,
          grad_value,    total_of(partial_weight, score_weight, needs[3]),
          grad_features, total_of(partial_feature_weight, feature_weight, needs[5])};
}

}  // namespace
}  // namespace fused_attn

TORCH_LIBRARY_IMPL(fused_attn_C, CPU, m) {
  m.impl("additive_attention_forward", &fused_attn::additive_attention_forward_cpu);
  m.impl("additive_attention_backward", &fused_attn::additive_attention_backward_cpu);
}
