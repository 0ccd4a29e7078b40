"""What sentinel compression adds to a model: embeddings of the sentinels, and LoRA on its layers."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass
from functools import cache
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
from thoughtformer.files import check_seal, read_json, seal
from thoughtformer.models.backbone import Backbone
from thoughtformer.models.handed_in import ACTING, Acting, acting

__all__ = ["AdapterConfig", "SentinelAdapter"]

CONFIG_FILE = "sentinel.json"
ROWS_FILE = "sentinel.safetensors"
LORA_FILE = "adapter_model.safetensors"
LORA_CONFIG_FILE = "adapter_config.json"
FORMAT_VERSION = 2
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
        if any(parameter.is_meta for parameter in backbone.model.parameters()):
            raise UnsupportedError(
                "some of the model's weights are offloaded (to the CPU or to disk), where an adapter can't be put "
                "beside them. Load it whole, on one device, or use a method without an adapter."
            )
        # Close to the mean embedding, and not all alike: where the model's layers are used to work.
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1 + config.num_sentinels, backbone.embedding_dim, generator=generator)
        rows = embeddings.mean(dim=0).cpu() + 0.1 * embeddings.std(dim=0).cpu() * noise
        self.rows = nn.Parameter(rows.to(embeddings.device, torch.promote_types(embeddings.dtype, torch.float32)))
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
        # It also leaves its configuration on the model, and would warn the next who adds an adapter.
        self._had_peft_config = hasattr(backbone.model, "peft_config")
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
        self._lora_layers = [module for module in backbone.model.modules() if isinstance(module, LoraLayer)]
        for layer in self._lora_layers:
            layer.__class__ = _gated(type(layer))  # type: ignore[assignment]
        self._layers = [(layer, type(layer)) for layer in backbone.layer_modules]
        for layer, kind in self._layers:
            layer.__class__ = _saying_so(kind)

    def acting_on(self, is_sentinel: Bool[Tensor, "rows entries"]) -> Acting:
        """What LoRA acts on in a call: sentinels alone, or everything."""
        return Acting(is_sentinel.reshape(-1).nonzero().squeeze(1) if self.config.sentinels_only else None)

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
            for layer, kind in self._layers:
                layer.__class__ = kind
            model: Any = self.peft.unload()
            for parameter in self._frozen:
                parameter.requires_grad_(True)
            if not self._had_peft_config and hasattr(model, "peft_config"):
                del model.peft_config
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
            seal(folder, [CONFIG_FILE, ROWS_FILE, *([LORA_FILE, LORA_CONFIG_FILE] if self.peft is not None else [])])
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
        check_seal(folder, "the adapter")
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
    values = read_json(folder / CONFIG_FILE, "the description of a sentinel adapter")
    if values.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} has version {values.get('version')}; this is {FORMAT_VERSION}, which names the "
            "base model by all of its weights: train the adapter anew, or use the release that wrote it."
        )
    needed = {"base", "vocab_size", *AdapterConfig.__dataclass_fields__}
    if needed - values.keys():
        raise CheckpointError(f"{folder / CONFIG_FILE} doesn't describe a sentinel adapter.")
    try:
        AdapterConfig(**{name: values[name] for name in AdapterConfig.__dataclass_fields__})
    except ConfigError as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} doesn't describe a sentinel adapter: {error}") from None
    return values


@cache
def _gated(kind: type[LoraLayer]) -> type[LoraLayer]:
    """LoRA that acts where the call under way says so, and is the layer beneath it everywhere else.

    So the model can be used as it is, also in other threads, while a view with an adapter exists.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        now = ACTING.get()
        if now is None or now.is_idle:
            return self.base_layer(x, *args, **kwargs)
        if now.entries is None:
            return kind.forward(self, x, *args, **kwargs)  # type: ignore[operator]
        whole = self.base_layer(x, *args, **kwargs)
        entries = now.entries.to(x.device)
        states = x.reshape(-1, x.shape[-1]).index_select(0, entries).to(self.lora_A[ADAPTER].weight.dtype)
        change = self.lora_B[ADAPTER](self.lora_A[ADAPTER](self.lora_dropout[ADAPTER](states))) * self.scaling[ADAPTER]
        return whole.reshape(-1, whole.shape[-1]).index_add(0, entries, change.to(whole.dtype)).view(whole.shape)

    return type(f"Gated{kind.__name__}", (kind,), {"forward": forward})


@cache
def _saying_so(kind: type[nn.Module]) -> type[nn.Module]:
    """A layer that has adapters act while it is called with what a view hands in.

    The backbone has them act for the length of a call; this is for gradient checkpointing, which calls a layer's
    `forward` once more when the call is long over.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        handed_in = kwargs.get("handed_in")
        if handed_in is None:
            return kind.forward(self, *args, **kwargs)
        with acting(handed_in.acting):
            return kind.forward(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


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
