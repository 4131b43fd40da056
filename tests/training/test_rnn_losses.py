"""The objective of recurrent models: copies, losses on attention, scheduled sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fused_attn.models import RNNSeq2Seq, RNNSeq2SeqConfig, Transformer, TransformerConfig
from fused_attn.training.data import Batch, ParallelDataset
from fused_attn.training.features import FeatureDataset, FeatureSequences
from fused_attn.training.kinds import build_model, model_fields
from fused_attn.training.loop import mean_loss
from fused_attn.training.loss import (
    attention_coverage_loss,
    guided_attention_loss,
    training_losses,
    translation_loss,
)

V = 14


def small(**fields) -> RNNSeq2Seq:
    torch.manual_seed(0)
    defaults = {
        "source_vocab_size": V,
        "target_vocab_size": V,
        "embedding_size": 8,
        "hidden_size": 8,
        "num_encoder_layers": 1,
        "num_decoder_layers": 1,
        "dropout": 0.0,
        "max_length": 32,
    }
    model = RNNSeq2Seq(RNNSeq2SeqConfig(**{**defaults, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)  # predictions that differ from step to step
    return model


@pytest.fixture(scope="module")
def dataset() -> ParallelDataset:
    random = np.random.default_rng(0)
    pairs = [
        [random.integers(4, V, random.integers(1, 7)).tolist() for _ in range(2)] for _ in range(9)
    ]
    return ParallelDataset([source for source, _ in pairs], [target for _, target in pairs])


@pytest.fixture
def batch(dataset) -> Batch:
    return dataset.batch(np.arange(9))


def forced(model: RNNSeq2Seq, batch: Batch) -> torch.Tensor:
    return model(batch.source, batch.target_input, batch.source_lengths, batch.target_lengths)


def test_the_loss_is_cross_entropy_of_the_logits_at_words(batch) -> None:
    model = small()
    logits = forced(model, batch).flatten(0, 1)[batch.target_rows]
    words = batch.target_output.flatten()[batch.target_rows]
    for smoothing in (0.0, 0.1):
        expected = F.cross_entropy(logits, words, reduction="sum", label_smoothing=smoothing)
        found = translation_loss(model, batch, label_smoothing=smoothing)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("output", ["pointer_generator", "copynet"])
def test_a_copying_models_loss_is_that_of_its_distribution(output) -> None:
    model = small(output=output, extra_tokens=3)
    dataset = ParallelDataset([[V, 5, V + 1, V], [6, V, 7]], [[V + 1, 8, V], [V, 3]])
    batch = dataset.batch(np.arange(2))
    log_p = forced(model, batch).flatten(0, 1)[batch.target_rows]
    assert log_p.shape == (batch.target_tokens, V + 3)
    words = batch.target_output.flatten()[batch.target_rows]
    expected = -log_p.gather(1, words[:, None]).sum()
    torch.testing.assert_close(translation_loss(model, batch), expected)
    assert expected.isfinite()
    mean = mean_loss(model, dataset)
    assert mean == pytest.approx(expected.item() / batch.target_tokens, rel=1e-5)
    with pytest.raises(ValueError, match=r"label_smoothing must be 0 with output"):
        translation_loss(model, batch, label_smoothing=0.1)


def test_losses_on_attention_are_added_by_their_weights(batch) -> None:
    model = small()
    losses = training_losses(model, batch, guided_attention=3.0, coverage_loss=0.5)
    weights = model.outputs(
        batch.source, batch.target_input, batch.source_lengths, batch.target_lengths
    ).attention
    guided = guided_attention_loss(weights, batch.source_lengths, batch.target_lengths)
    coverage = attention_coverage_loss(weights, batch.target_lengths)
    torch.testing.assert_close(losses.guided_attention, guided)
    torch.testing.assert_close(losses.coverage, coverage)
    torch.testing.assert_close(losses.total, losses.translation + 3.0 * guided + 0.5 * coverage)
    assert guided > 0
    assert coverage > 0
    torch.testing.assert_close(losses.translation, translation_loss(model, batch))
    # The gradient of the parts that are added reaches the attention.
    score = model.decoder.attention
    for part in (losses.guided_attention, losses.coverage):
        gradients = torch.autograd.grad(part, list(score.parameters()), retain_graph=True)
        assert any(gradient.abs().max() > 0 for gradient in gradients)


def test_losses_on_attention_need_attention(batch) -> None:
    for weight in ("guided_attention", "coverage_loss"):
        with pytest.raises(ValueError, match="must be 0 for a model without attention, got"):
            training_losses(small(attention="none"), batch, **{weight: 1.0})


def test_guided_attention_of_frames_that_are_joined() -> None:
    random = np.random.default_rng(1)
    source = FeatureSequences.from_list([random.normal(size=(n, 2)) for n in (9, 4)])
    batch = FeatureDataset(source, [[5, 6], [7]]).batch(np.arange(2))
    model = small(source_features=2, source_vocab_size=0, time_reduction=4)
    weights = model.outputs(
        batch.source, batch.target_input, batch.source_lengths, batch.target_lengths
    ).attention
    assert weights.shape == (2, 3, 3)
    expected = guided_attention_loss(weights, torch.tensor([3, 1]), batch.target_lengths)
    found = training_losses(model, batch, guided_attention=1.0).guided_attention
    torch.testing.assert_close(found, expected)


FORMS = [
    {},
    {"attention": "location", "input_feeding": True},
    {"attention": "none", "cell": "gru", "context": "every_step"},
    {"output": "pointer_generator", "extra_tokens": 2, "coverage": True},
]


@pytest.mark.parametrize("fields", FORMS, ids=lambda fields: "-".join(fields) or "plain")
def test_at_probability_0_it_is_teacher_forcing_bit_for_bit(fields, batch) -> None:
    model = small(**fields)
    state = torch.get_rng_state()
    found = training_losses(model, batch, sampling_probability=0.0)
    assert torch.equal(found.total, translation_loss(model, batch))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fields", FORMS, ids=lambda fields: "-".join(fields) or "plain")
def test_at_probability_1_each_step_reads_its_own_prediction(fields, batch) -> None:
    model = small(**fields)
    read = batch.target_input.clone()
    for t in range(1, read.shape[1]):
        prefix = model(batch.source, read[:, :t], batch.source_lengths)
        read[:, t] = prefix[:, -1].argmax(dim=-1)
    assert (read != batch.target_input).sum() > batch.target_tokens / 2
    expected = translation_loss(model, Batch(**{**vars(batch), "target_input": read}))
    found = training_losses(model, batch, sampling_probability=1.0).total
    torch.testing.assert_close(found, expected)


def test_a_checkpoints_fields_say_what_it_is() -> None:
    rnn = small(cell="gru", attention="general")
    transformer = Transformer(
        TransformerConfig(
            source_vocab_size=V,
            target_vocab_size=V,
            d_model=8,
            num_heads=2,
            num_encoder_layers=1,
            num_decoder_layers=1,
        )
    )
    assert model_fields(rnn)["type"] == "rnn"
    assert model_fields(transformer) == transformer.config.to_dict()
    for model in (rnn, transformer):
        again = build_model(model_fields(model))
        assert type(again) is type(model)
        assert again.config == model.config
    with pytest.raises(ValueError, match="type must be transformer or rnn, got 'mlp'"):
        build_model({"type": "mlp"})
    with pytest.raises(ValueError, match="fields must be known, got d_model"):
        build_model({**model_fields(rnn), "d_model": 4})
