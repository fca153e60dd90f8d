"""Settings of the network that do not go together are refused in one line."""

from typing import Any

import pytest

from nmt.config import AttentionConfig, ModelConfig


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"size": 512, "heads": 3}, "model.attention.heads=3 must divide model.attention.size=512"),
        ({"function": "additive", "heads": 2}, "heads=2 is for function=product, not additive"),
        ({"heads": 0}, "model.attention.heads=0 must be at least 1"),
    ],
)
def test_attention(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        AttentionConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"hidden_size": 6, "attention": AttentionConfig(size=8, heads=4)},
            "model.attention.heads=4 must divide model.hidden_size=6",
        ),
        ({"norm": "post"}, "model.norm=post .*none, moe, layers"),
        ({"bidirectional_layers": 0}, "model.bidirectional_layers=0 must be at least 1"),
        ({"bidirectional_layers": 4}, "model.bidirectional_layers=4 must be at most num_encoder_layers=3"),
        (
            {"bidirectional_layers": 2, "bottom_layer": "forward"},
            "model.bidirectional_layers=2 is for bottom_layer=bidirectional_half, not forward: leave it out",
        ),
    ],
)
def test_layers(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ModelConfig(**settings)
