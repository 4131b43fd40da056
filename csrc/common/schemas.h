// The schemas of the compiled library's operators, one for all devices.
#pragma once

#include <torch/library.h>

namespace fused_attn {

inline void define_operators(torch::Library& m) {
  m.def(
      "add_layer_norm_forward(Tensor x, Tensor? x_bias, Tensor? residual, Tensor? weight, "
      "Tensor? bias, Tensor? seed, float eps, float dropout_p, bool is_rms, "
      "ScalarType? sum_dtype) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "add_layer_norm_backward(Tensor grad_output, Tensor? grad_sum, Tensor x, Tensor? x_bias, "
      "Tensor? residual, Tensor mean, Tensor rstd, Tensor? weight, Tensor? seed, float dropout_p, "
      "bool is_rms, bool x_is_sum, ScalarType? grad_residual_dtype, bool need_x_bias, "
      "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "additive_attention_forward(Tensor query, Tensor key, Tensor? value, Tensor score_weight, "
      "Tensor? features, Tensor? feature_weight, Tensor? mask, Tensor? key_lengths) -> "
      "(Tensor, Tensor)");
  m.def(
      "additive_attention_backward(Tensor? grad_context, Tensor? grad_weights, Tensor query, "
      "Tensor key, Tensor? value, Tensor score_weight, Tensor? features, Tensor? feature_weight, "
      "Tensor? mask, Tensor? key_lengths, Tensor? weights, bool[6] needs) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "bias_activation_dropout_forward(Tensor x, Tensor? bias, Tensor? residual, Tensor? seed, "
      "str activation, bool gated, float dropout_p) -> Tensor");
  m.def(
      "bias_activation_dropout_backward(Tensor grad_output, Tensor? x, Tensor? bias, Tensor? seed, "
      "str activation, bool gated, float dropout_p, bool need_grad_x, bool need_grad_bias) -> "
      "(Tensor, Tensor)");
  m.def(
      "beam_search_step(Tensor logits, Tensor scores, int eos_token, Tensor? temperature, "
      "Tensor? edit_tokens, Tensor? edit_factors, Tensor? edit_offsets, Tensor? forced_tokens, "
      "Tensor? shortlist) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "decode_attention(Tensor query, Tensor key, Tensor value, Tensor? key_lengths, "
      "Tensor? ancestry, Tensor? mask, Tensor? alibi_slopes, bool is_causal, int window, "
      "float scale, float softcap) -> (Tensor, Tensor)");
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, "
      "Tensor? alibi_slopes, Tensor? query_lengths, Tensor? key_lengths, Tensor? query_offsets, "
      "Tensor? key_offsets, Tensor[] block_mask, Tensor? seed, int left, int right, "
      "bool align_lower_right, float scale, float softcap, int activation, float dropout_p, "
      "int max_queries, int max_keys) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, "
      "Tensor value, Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? query_lengths, "
      "Tensor? key_lengths, Tensor? query_offsets, Tensor? key_offsets, Tensor[] block_mask, "
      "Tensor? seed, int left, int right, bool align_lower_right, float scale, float softcap, "
      "int activation, float dropout_p, int max_queries, int max_keys, Tensor output, Tensor lse, "
      "bool need_grad_bias) -> (Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace fused_attn
