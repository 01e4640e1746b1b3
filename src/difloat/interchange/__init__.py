"""Files of other programs: exporting them without any loss, importing them, and validating them."""

from difloat.interchange.export import export_checkpoint, remarks_of
from difloat.interchange.import_ import import_into, model_of, model_with
from difloat.interchange.remarks import Remark
from difloat.interchange.schemes import DIALECTS
from difloat.interchange.validate import validate

__all__ = [
    "DIALECTS",
    "Remark",
    "export_checkpoint",
    "import_into",
    "model_of",
    "model_with",
    "remarks_of",
    "validate",
]
