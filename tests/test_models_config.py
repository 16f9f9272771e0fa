"""How a model's layers are counted, and which of them another model takes or is matched with."""

import pytest

from rtd_jax.models.config import LlamaConfig, layers_to_copy, layers_to_match

CONFIG = LlamaConfig(16, 8, 8, layers=3, heads=1, kv_heads=1, head_dim=8)


def test_hidden_states_are_counted_from_both_ends():
    assert [CONFIG.layer_index(layer) for layer in (0, 1, 3, -1, -4)] == [0, 1, 3, 3, 0]
    for layer in (4, -5):
        with pytest.raises(ValueError, match=f"hidden layer {layer} does not exist: .* 3 layers has 0 .* to 3"):
            CONFIG.layer_index(layer)


@pytest.mark.parametrize(("layers", "count", "wanted"), [(7, 3, (0, 3, 6)), (4, 4, (0, 1, 2, 3)), (5, 1, (0,))])
def test_copied_layers_include_the_first_and_the_last(layers, count, wanted):
    assert layers_to_copy(layers, count) == wanted


@pytest.mark.parametrize(
    ("layers", "count", "wanted"),
    [(4, 4, (1, 2, 3, 4)), (2, 4, (1, 1, 2, 2)), (32, 4, (8, 16, 24, 32)), (80, 4, (20, 40, 60, 80)), (3, 1, (3,))],
)
def test_matched_layers_are_evenly_spaced_and_end_with_the_last(layers, count, wanted):
    assert layers_to_match(layers, count) == wanted
