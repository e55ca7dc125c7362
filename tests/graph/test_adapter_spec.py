"""What an adapter may be, also where its numbers and names are written by hand."""

from __future__ import annotations

from typing import Any

import pytest

from weft.base.errors import ConfigError
from weft.graph.adapter_spec import AdapterKind, AdapterSpec, LayerWidths, resolve_targets

WIDTHS = LayerWidths(hidden=8, query=8, kv=4, ffn=16)


def test_lists_and_names_of_kinds_mean_what_tuples_and_members_do() -> None:
    by_hand: Any = {
        "kind": "ia3",
        "target_modules": ["k_proj", "down_proj"],
        "exclude_modules": ["model.layers.0.self_attn.k_proj"],
        "feedforward_modules": ["down_proj"],
        "layers_to_transform": [0, 1],
    }
    spec = AdapterSpec(**by_hand)
    assert spec == AdapterSpec(
        kind=AdapterKind.IA3,
        target_modules=("k_proj", "down_proj"),
        exclude_modules=("model.layers.0.self_attn.k_proj",),
        feedforward_modules=("down_proj",),
        layers_to_transform=(0, 1),
    )
    targets = resolve_targets(spec, num_layers=2, widths=WIDTHS)
    assert [(t.layer, t.module, t.rank, t.scales_input) for t in targets] == [
        (0, "down_proj", 0, True),
        (1, "k_proj", 0, False),
        (1, "down_proj", 0, True),
    ]


def test_one_unknown_module_in_a_list_is_refused() -> None:
    names: Any = ["q_proj", "nothing"]
    with pytest.raises(ConfigError, match="'nothing' is unknown; there are q_proj"):
        resolve_targets(AdapterSpec(target_modules=names), num_layers=2, widths=WIDTHS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dora"}, "kind is 'dora'; it must be one of lora, ia3, bottleneck"),
        ({"rank": 1.5}, ", and whole"),
        ({"rank": True}, ", and whole"),
        ({"rank": "8"}, ", and whole"),
        ({"rank": 257}, r"in \[1, 256\]"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj: the rank is 0"),
        ({"rank_pattern": {"(": 4}}, "no regular expression"),
        ({"rank_pattern": {"(?i)Q_PROJ": 4}}, "no regular expression: global flags"),
        ({"alpha_pattern": {"[": 4.0}}, "no regular expression"),
        ({"alpha": "16"}, "alpha is '16'"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": 1e300}, "alpha is 1e[+]300; .* 1e[+]06 at most"),
        ({"alpha_pattern": {"q_proj": 1e39}}, "q_proj: alpha is 1e[+]39"),
        ({"dropout": "0.1"}, "dropout is '0.1'"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": ["q_proj", 3]}, "target_modules is"),
        ({"target_modules": []}, "empty"),
        ({"target_modules": "q_proj["}, "no regular expression"),
        ({"target_modules": "q{99999999999999}"}, "no regular expression: the repetition number"),
        ({"target_modules": "(" * 3000 + ")" * 3000}, "no regular expression: maximum recursion"),
    ],
)
def test_what_cannot_be_is_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdapterSpec(**options)
