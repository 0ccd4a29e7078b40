"""What sentinel compression adds to a model: embeddings of the sentinels, and LoRA on its layers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thoughtformer.checks import check_count, check_fields
from thoughtformer.errors import CheckpointError, ConfigError, OutputError, UnsupportedError
from thoughtformer.models.backbone import Backbone

__all__ = ["AdapterConfig", "SentinelAdapter"]

CONFIG_FILE = "sentinel.json"
ROWS_FILE = "sentinel.safetensors"
LORA_FILE = "adapter_model.safetensors"
FORMAT_VERSION = 1
ADAPTER = "sentinel"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The shape of an adapter.

    Args:
        num_sentinels: summaries a span, the k of `<CR>_1` to `<CR>_k`.
        see_earlier: summaries also read those of spans folded before.
        lora_rank: 0 for no LoRA, so that the sentinels' rows alone are trained.
        lora_alpha: LoRA's scale is `lora_alpha / lora_rank`.
        lora_dropout: in training.
        lora_layers: `attention` for the attention's projections, `all` for every linear layer of the model's body.
        sentinels_only: LoRA acts on sentinels alone, and tokens are computed by the base model.
    """

    num_sentinels: int = 1
    see_earlier: bool = False
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    lora_layers: str = "attention"
    sentinels_only: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_count("num_sentinels", self.num_sentinels, 1)
        check_count("lora_rank", self.lora_rank, 0)
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout={self.lora_dropout} must be at least 0 and below 1.")
        if self.lora_layers not in ("attention", "all"):
            raise ConfigError(f"lora_layers={self.lora_layers!r}: attention or all.")


class SentinelAdapter(nn.Module):
    """The sentinels' embeddings, and the LoRA that it has put into a backbone's model.

    The model's vocabulary is left as it is: sentinels have the ids from `vocab_size` on, are embedded here, and have
    no logits, because nothing ever predicts them.
    """

    def __init__(self, backbone: Backbone, config: AdapterConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = backbone.vocab_size
        embeddings = cast(nn.Embedding, backbone.model.get_input_embeddings()).weight.detach()
        # Close to the mean embedding, and not all alike: where the model's layers are used to work.
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1 + config.num_sentinels, backbone.embedding_dim, generator=generator)
        rows = embeddings.mean(dim=0).cpu() + 0.1 * embeddings.std(dim=0).cpu() * noise
        self.rows = nn.Parameter(rows.to(embeddings.device, torch.promote_types(embeddings.dtype, torch.float32)))
        self._sentinels: Tensor | None = None
        self._leading = torch.Size()
        self.peft: PeftModel | None = None
        self._lora: list[nn.Parameter] = []
        if config.lora_rank:
            self._add_lora(backbone)

    def _add_lora(self, backbone: Backbone) -> None:
        if any(isinstance(module, LoraLayer) for module in backbone.model.modules()):
            raise UnsupportedError("the model has a LoRA already: merge it (merge_and_unload) or unload it first.")
        config = self.config
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  peft declares int and divides
            lora_dropout=config.lora_dropout,
            target_modules=_target_names(backbone, config.lora_layers),
            fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in backbone.attention_modules[0].modules()),
            task_type="CAUSAL_LM",
        )
        was_training = backbone.model.training
        # peft freezes what it doesn't train, and leaves it frozen.
        self._frozen = [p for p in backbone.model.parameters() if p.requires_grad]
        with warnings.catch_warnings():
            # peft asks transformers by a name that transformers has renamed; users can't change it.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            peft = get_peft_model(backbone.model, lora, adapter_name=ADAPTER)
        peft.train(was_training)
        self._lora = [parameter for name, parameter in peft.named_parameters() if "lora_" in name]
        for parameter in self._lora:
            parameter.data = parameter.data.to(self.rows.dtype)
        # Not registered as a part: the adapter's own parameters are the rows and LoRA's, not the whole model's.
        object.__setattr__(self, "peft", peft)
        self._layers = [module for module in backbone.model.modules() if isinstance(module, LoraLayer)]
        self._hooks = []
        if config.sentinels_only:
            for layer in self._layers:
                self._hooks.append(layer.lora_A[ADAPTER].register_forward_pre_hook(self._take))
                self._hooks.append(layer.lora_B[ADAPTER].register_forward_hook(self._put))

    def _take(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        """LoRA's input: the sentinels' states alone."""
        (states,) = inputs
        self._leading = states.shape[:-1]
        index = torch.zeros(0, dtype=torch.long, device=states.device) if self._sentinels is None else self._sentinels
        return (states.reshape(-1, states.shape[-1]).index_select(0, index),)

    def _put(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """LoRA's output: nothing for tokens."""
        index = torch.zeros(0, dtype=torch.long, device=output.device) if self._sentinels is None else self._sentinels
        whole = output.new_zeros(self._leading.numel(), output.shape[-1]).index_copy(0, index, output)
        return whole.view(*self._leading, output.shape[-1])

    @contextmanager
    def acting_on(self, sentinel: Bool[Tensor, "rows entries"]) -> Iterator[None]:
        """For the length of one forward pass: where LoRA acts on sentinels only, says which entries are sentinels."""
        if not self.config.sentinels_only or self.peft is None:
            yield
            return
        self._sentinels = sentinel.reshape(-1).nonzero().squeeze(1)
        is_idle = len(self._sentinels) == 0
        for layer in self._layers:
            layer._disable_adapters = is_idle  # its public setter also changes what requires gradients
        try:
            yield
        finally:
            self._sentinels = None
            for layer in self._layers:
                layer._disable_adapters = False

    def embed(
        self, backbone: Backbone, input_ids: Int[Tensor, "rows entries"]
    ) -> Float[Tensor, "rows entries embedding"]:
        """Embeddings of tokens by the model, of sentinels by the adapter."""
        is_sentinel = input_ids >= self.vocab_size
        embedded = backbone.embed(input_ids.masked_fill(is_sentinel, 0))
        rows = self.rows.to(embedded.dtype)[(input_ids - self.vocab_size).clamp(min=0)]
        return torch.where(is_sentinel.unsqueeze(-1), rows, embedded)

    def trainable(self) -> list[nn.Parameter]:
        """The sentinels' rows and LoRA's matrices."""
        return [self.rows, *self._lora]

    def remove(self) -> None:
        """Takes LoRA out of the model, which is then just what it was."""
        if self.peft is not None:
            for hook in self._hooks:
                hook.remove()
            self.peft.unload()
            for parameter in self._frozen:
                parameter.requires_grad_(True)
            object.__setattr__(self, "peft", None)

    def lora_state(self) -> dict[str, Tensor]:
        """LoRA's matrices by peft's names."""
        return {} if self.peft is None else get_peft_model_state_dict(self.peft, adapter_name=ADAPTER)

    def save(self, folder: Path, *, fingerprint: str, half: bool = False) -> None:
        """Writes the adapter into a folder that exists: peft's own files for LoRA, ours for the rest.

        Args:
            folder: where to.
            fingerprint: of the base model's weights.
            half: store float16.
        """
        dtype = torch.float16 if half else torch.float32
        try:
            if self.peft is not None:
                lora = self.peft.peft_config[ADAPTER]
                was = lora.inference_mode, lora.base_model_name_or_path
                # Where the base lay on this machine is nobody else's business; its fingerprint tells it.
                lora.inference_mode, lora.base_model_name_or_path = True, None
                lora.save_pretrained(str(folder))
                lora.inference_mode, lora.base_model_name_or_path = was
                state = {
                    name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self.lora_state().items()
                }
                save_file(state, folder / LORA_FILE, metadata={"format": "pt"})
            save_file({"rows": self.rows.detach().to("cpu", dtype).contiguous()}, folder / ROWS_FILE)
            values = {"version": FORMAT_VERSION, "base": fingerprint, "vocab_size": self.vocab_size}
            text = json.dumps({**values, **asdict(self.config)}, indent=2) + "\n"
            (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise OutputError(f"couldn't write the adapter to {folder}: {error}") from error

    @classmethod
    def load(cls, backbone: Backbone, folder: Path, *, fingerprint: str) -> SentinelAdapter:
        """Puts a saved adapter into a model.

        Raises:
            CheckpointError: no adapter, a truncated one, or one of another base model.
        """
        values = read_adapter_manifest(folder)
        if values["base"] != fingerprint:
            raise CheckpointError(
                f"the adapter in {folder} was trained for a model with fingerprint {values['base']}, this one has "
                f"{fingerprint}: they don't belong together."
            )
        settings = {name: values[name] for name in AdapterConfig.__dataclass_fields__}
        config = AdapterConfig(**settings)
        # Everything is read before the model is touched.
        files = [folder / ROWS_FILE] + ([folder / LORA_FILE] if config.lora_rank else [])
        states = []
        for file in files:
            try:
                states.append(load_file(file))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{file} is missing, truncated or no safetensors file: {error}") from None
        adapter = cls(backbone, config)
        try:
            rows = states[0].get("rows")
            if rows is None or rows.shape != adapter.rows.shape:
                raise CheckpointError(f"{files[0]} doesn't hold {tuple(adapter.rows.shape)} sentinel rows.")
            if config.lora_rank:
                expected = {name: tensor.shape for name, tensor in adapter.lora_state().items()}
                found = {name: tensor.shape for name, tensor in states[1].items()}
                if expected != found:
                    odd = sorted(set(expected.items()) ^ set(found.items()))
                    raise CheckpointError(f"{files[1]} doesn't fit the model: {odd[0][0]} differs.")
                set_peft_model_state_dict(cast(PeftModel, adapter.peft), states[1], adapter_name=ADAPTER)
            with torch.no_grad():
                adapter.rows.copy_(rows)
        except BaseException:
            adapter.remove()
            raise
        for parameter in adapter.trainable():
            parameter.requires_grad_(False)
        return adapter


def read_adapter_manifest(folder: Path) -> dict[str, Any]:
    """What an adapter's folder says of itself; raises `CheckpointError`."""
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}: not a sentinel adapter's folder.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"can't read {folder / CONFIG_FILE}: {error}") from None
    needed = {"version", "base", "vocab_size", *AdapterConfig.__dataclass_fields__}
    if not isinstance(values, dict) or needed - values.keys():
        raise CheckpointError(f"{folder / CONFIG_FILE} doesn't describe a sentinel adapter.")
    if values["version"] != FORMAT_VERSION:
        raise CheckpointError(f"{folder / CONFIG_FILE} has version {values['version']}; this is {FORMAT_VERSION}.")
    return values


def _target_names(backbone: Backbone, layers: str) -> list[str]:
    """Full names of the linear layers that LoRA changes."""
    attention = {id(module) for part in backbone.attention_modules for module in part.modules()}
    head = backbone.head()
    names = []
    for name, module in backbone.model.named_modules():
        is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if is_linear and module is not head and (layers == "all" or id(module) in attention):
            names.append(name)
    return names
