"""All faster modules together: what a CPU gets after its model was loaded."""

from dataclasses import asdict, dataclass

from transformers import PreTrainedModel

from shared.engine.modules.arena import lay_together
from shared.engine.modules.gated import replace_gated_mlps
from shared.engine.modules.last_layer import Rows, spare_last_layer
from shared.engine.modules.linears import pack_linears
from shared.engine.modules.norms import replace_norms
from shared.engine.modules.rotary import replace_rotary
from shared.engine.native.library import Library


@dataclass(slots=True, frozen=True)
class Replaced:
    """How many modules have a faster one in their place."""

    linears: int = 0
    norms: int = 0
    mlps: int = 0
    rotary: int = 0
    of_last_layer: int = 0

    def __str__(self) -> str:
        return (
            ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in asdict(self).items() if number) or "none"
        )


def put_in_fast_modules(model: PreTrainedModel, library: Library | None, rows: Rows) -> Replaced:
    """Put in whatever there is for this model on this machine; each only after a test.

    Without the native kernels only linears can be faster.

    Args:
        rows: asked in every step.
    """
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    linears = pack_linears(model, library)
    if library is None:
        return Replaced(linears, of_last_layer=spare_last_layer(model, num_layers, rows))
    lay_together(model)
    return Replaced(
        linears=linears,
        norms=replace_norms(model, library),
        mlps=replace_gated_mlps(model, model.dtype),
        rotary=replace_rotary(model, model.dtype, library),
        of_last_layer=spare_last_layer(model, num_layers, rows),
    )
