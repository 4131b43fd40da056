// attention's operators as the schemas name their arguments, and functions that take these
// together.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace fused_attn {

using OptionalTensor = std::optional<at::Tensor>;

// The operator's arguments between the tensors and the options, as the schema names them.
struct AttentionArguments {
  const at::Tensor& query;
  const at::Tensor& key;
  const at::Tensor& value;
  const OptionalTensor& mask;
  const OptionalTensor& bias;
  const OptionalTensor& alibi_slopes;
  const OptionalTensor& query_lengths;
  const OptionalTensor& key_lengths;
  const OptionalTensor& query_offsets;
  const OptionalTensor& key_offsets;
  at::TensorList block_mask;
  const OptionalTensor& seed;
  int64_t left;
  int64_t right;
  bool align_lower_right;
  double scale;
  double softcap;
  int64_t activation;
  double dropout_p;
  int64_t max_queries;
  int64_t max_keys;
};

// The operator that calls kForward(arguments).
template <auto kForward>
std::tuple<at::Tensor, at::Tensor> attention_forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const OptionalTensor& mask, const OptionalTensor& bias, const OptionalTensor& alibi_slopes,
    const OptionalTensor& query_lengths, const OptionalTensor& key_lengths,
    const OptionalTensor& query_offsets, const OptionalTensor& key_offsets,
    at::TensorList block_mask, const OptionalTensor& seed, int64_t left, int64_t right,
    bool align_lower_right, double scale, double softcap, int64_t activation, double dropout_p,
    int64_t max_queries, int64_t max_keys) {
  return kForward({query,        key,           value,       mask,          bias,
                   alibi_slopes, query_lengths, key_lengths, query_offsets, key_offsets,
                   block_mask,   seed,          left,        right,         align_lower_right,
                   scale,        softcap,       activation,  dropout_p,     max_queries,
                   max_keys});
}

// The operator that calls kBackward(grad_output, grad_lse, arguments, output, lse,
// need_grad_bias).
template <auto kBackward>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad_output, const OptionalTensor& grad_lse, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const OptionalTensor& mask,
    const OptionalTensor& bias, const OptionalTensor& alibi_slopes,
    const OptionalTensor& query_lengths, const OptionalTensor& key_lengths,
    const OptionalTensor& query_offsets, const OptionalTensor& key_offsets,
    at::TensorList block_mask, const OptionalTensor& seed, int64_t left, int64_t right,
    bool align_lower_right, double scale, double softcap, int64_t activation, double dropout_p,
    int64_t max_queries, int64_t max_keys, const at::Tensor& output, const at::Tensor& lse,
    bool need_grad_bias) {
  return kBackward(grad_output, grad_lse,
                   {query,        key,           value,       mask,          bias,
                    alibi_slopes, query_lengths, key_lengths, query_offsets, key_offsets,
                    block_mask,   seed,          left,        right,         align_lower_right,
                    scale,        softcap,       activation,  dropout_p,     max_queries,
                    max_keys},
                   output, lse, need_grad_bias);
}

}  // namespace fused_attn
