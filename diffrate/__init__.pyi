from . import patch
from .blocks.block import UnsupportedModelError
from .blocks.rates import RateError
from .blocks.tokens import TokenState
from .budget import BudgetError
from .converting.as_transformers import as_transformers
from .converting.convert import convert
from .evaluation import Scores, ScoresError, Tally, evaluate
from .files.export import Exported, export
from .files.graph import plain
from .files.header import About, ExportError, SavedModelError, about
from .files.save import load, save
from .files.text_head import text_head
from .latency.measure import Confirmed, PredictionCheck, check_predictions, measure_latency
from .latency.table import LatencyFileError, LatencyTable
from .patch.base import CompressedModel
from .pictures import AttentionMaps, VisualizationError, attention_maps, make_visualization
from .schedule import Schedule, ScheduleError, scale_schedule
from .searching.checkpoint import EpochRecord, NonFiniteLossError, SearchCheckpointError, StepRecord, StoppedError
from .searching.gradient import Observer
from .searching.hard_counts import Calibrated, CalibrationObserver
from .searching.search import Found, search
from .searching.settings import SearchSettingError, SearchSettings
from .searching.teacher import Sensitivity, sensitivity
from .searching.trials import TrialRecord
from .timing import Speed, benchmark

__version__: str

ROUNDS: int
__all__ = [
    "About",
    "AttentionMaps",
    "BudgetError",
    "Calibrated",
    "CalibrationObserver",
    "CompressedModel",
    "Confirmed",
    "EpochRecord",
    "ExportError",
    "Exported",
    "Found",
    "LatencyFileError",
    "LatencyTable",
    "NonFiniteLossError",
    "Observer",
    "PredictionCheck",
    "RateError",
    "SavedModelError",
    "Schedule",
    "ScheduleError",
    "Scores",
    "ScoresError",
    "SearchCheckpointError",
    "SearchSettingError",
    "SearchSettings",
    "Sensitivity",
    "Speed",
    "StepRecord",
    "StoppedError",
    "Tally",
    "TokenState",
    "TrialRecord",
    "UnsupportedModelError",
    "VisualizationError",
    "about",
    "as_transformers",
    "attention_maps",
    "benchmark",
    "check_predictions",
    "convert",
    "evaluate",
    "export",
    "load",
    "make_visualization",
    "measure_latency",
    "patch",
    "plain",
    "save",
    "scale_schedule",
    "search",
    "sensitivity",
    "text_head",
]
