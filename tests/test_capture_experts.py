"""Experts fused into one parameter are captured one by one, each with the tokens routed to it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import SPECIAL, WORDS, out, run, save_model, text, windows_of

from awq_pycuda import run as run_command
from awq_pycuda.layers.files import FileLayer, load_layers, unreached_layers

SIZES = {
    "vocab_size": len(SPECIAL + WORDS),
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}


def mixtral(folder: Path, experts: int) -> Path:
    config = transformers.MixtralConfig(**SIZES, num_local_experts=experts, num_experts_per_tok=2)
    return save_model(folder, config, special=False)


def gpt_oss(folder: Path) -> Path:
    config = transformers.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    save_model(folder, config, special=False)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "router" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def experts_inputs(folder: Path, windows: list[list[int]]) -> tuple[Any, list[tuple[Any, Any]]]:
    """The module of a model's experts, and what goes into it: rows and the experts chosen for each, per window."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    module = model.layers[0].mlp.experts
    calls: list[tuple[Any, Any]] = []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((*args, *kwargs.values())[:2]), with_kwargs=True
    )
    with torch.no_grad():
        for window in windows:
            model(input_ids=torch.tensor([window]))
    return module, calls


def captured(folder: Path, text: Path, out: Path, tokens: int) -> dict[str, FileLayer]:
    assert run(f"model={folder}", f"text={text}", f"out={out}", f"tokens={tokens}") == 0
    return {layer.name: layer for layer in load_layers(out)}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("tokens", [16, 20])
def test_each_expert_has_the_tokens_routed_to_it(
    kind: str, tokens: int, text: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mixtral(tmp_path / "model", 4) if kind == "mixtral" else gpt_oss(tmp_path / "model")
    layers = captured(folder, text, out, tokens)
    windows = windows_of(text, special=False)[:2]
    windows[1] = windows[1][: tokens - 16]
    module, calls = experts_inputs(folder, [window for window in windows if window])
    reached = 0
    for expert in range(4):
        rows = torch.cat([hidden[(chosen == expert).any(-1)] for hidden, chosen in calls])
        name = f"layers.0.mlp.experts.{expert}"
        if not len(rows):
            assert f"{name}.gate_up_proj" in unreached_layers(out)
            continue
        reached += 1
        up, down = layers[f"{name}.gate_up_proj"], layers[f"{name}.down_proj"]
        assert up.activations is not None
        assert down.activations is not None
        np.testing.assert_allclose(up.activations, rows.numpy(), rtol=1e-4, atol=1e-6)
        product = up.activations @ up.weight.T
        if kind == "mixtral":
            weights = module.gate_up_proj[expert], module.down_proj[expert]
            gate, other = torch.from_numpy(product).chunk(2, dim=-1)
            gated = torch.nn.functional.silu(gate) * other
        else:
            weights = module.gate_up_proj[expert].T, module.down_proj[expert].T
            assert up.bias is not None
            assert down.bias is not None
            np.testing.assert_array_equal(up.bias, module.gate_up_proj_bias[expert].detach().numpy())
            np.testing.assert_array_equal(down.bias, module.down_proj_bias[expert].detach().numpy())
            gated = module._apply_gate(torch.from_numpy(product + up.bias))
        np.testing.assert_array_equal(up.weight, weights[0].detach().numpy())
        np.testing.assert_array_equal(down.weight, weights[1].detach().numpy())
        np.testing.assert_allclose(down.activations, gated.numpy(), rtol=1e-4, atol=1e-6)
    assert reached >= 2
    assert "experts: layers.0.mlp.experts, 4 of 4: " in capsys.readouterr().err


def test_an_expert_that_no_token_reached_is_named_and_left_out_of_a_run(
    text: Path, tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = captured(mixtral(tmp_path / "model", 8), text, out, 3)
    idle = unreached_layers(out)
    assert idle
    assert not set(idle) & set(layers)
    assert len(idle) + len(layers) == 4 + 2 * 8
    told = capsys.readouterr().err
    numbers = ",".join(name.split(".")[-2] for name in idle if name.endswith("down_proj"))
    assert f"no token reached layers.0.mlp.experts.{{{numbers}}}.down_proj: written without activations" in told
    monkeypatch.chdir(tmp_path)
    arguments = ["inputs=file", f"inputs.path={out}", "backend=cpu", "hydra.run.dir=run"]
    monkeypatch.setattr("sys.argv", ["run", *arguments])
    assert run_command.main() == 0
    assert (
        f"left out, since no token reached them when they were captured: {', '.join(idle)}" in capsys.readouterr().out
    )


def test_include_finds_experts_by_their_own_paths(text: Path, tmp_path: Path, out: Path) -> None:
    folder = mixtral(tmp_path / "model", 4)
    assert run(f"model={folder}", f"text={text}", f"out={out}", "tokens=33", r"include=experts\.[02]\.down") == 0
    assert [layer.name for layer in load_layers(out)] == [f"layers.0.mlp.experts.{index}.down_proj" for index in (0, 2)]


@pytest.mark.parametrize(
    ("kind", "stacks"),
    [
        ("dbrx", ["blocks.0.ffn.experts.mlp"]),
        ("jetmoe", ["layers.0.mlp.input_linear", "layers.0.mlp.output_linear"]),
        ("llama4_text", ["layers.0.feed_forward.experts"]),
    ],
)
def test_other_layouts_of_stacks(kind: str, stacks: list[str], text: Path, tmp_path: Path, out: Path) -> None:
    """Rows of a flattened stack, of sorted tokens, and of all experts at once: as many as tokens are routed."""
    more: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size_mlp": 24}
    if kind == "dbrx":
        ffn = {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}
        attention = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}
        sizes = {"d_model": 32, "n_heads": 2, "n_layers": 1, "max_seq_len": 16, "vocab_size": len(SPECIAL + WORDS)}
        config = transformers.DbrxConfig(**sizes, attn_config=attention, ffn_config=ffn)
    else:
        config = transformers.AutoConfig.for_model(kind, **SIZES, **more)
    layers = captured(save_model(tmp_path / "model", config, special=False), text, out, 33)
    for stack in stacks:
        rows: dict[str, int] = {}
        for name, layer in layers.items():
            if name.startswith(f"{stack}."):
                assert layer.activations is not None
                parameter = name.removeprefix(f"{stack}.").partition(".")[2]
                rows[parameter] = rows.get(parameter, 0) + len(layer.activations)
        assert rows
        assert set(rows.values()) == {2 * 33}
