from . import patch
from .blocks.forms import UnsupportedModelError
from .blocks.tokens import TokenState
from .budgets.budget import BudgetError
from .budgets.schedule import Schedule, ScheduleError, scale_schedule
from .exporting.export import Exported, export
from .exporting.plain import plain
from .exporting.targets import ExportError
from .latency.check import PredictionCheck, check_predictions
from .latency.confirm import Confirmed
from .latency.file import LatencyFileError
from .latency.measure import measure_latency
from .latency.table import LatencyTable
from .patch.base import CompressedModel
from .pictures import VisualizationError, make_visualization
from .rates.rate import RateError
from .running.evaluation import Scores, ScoresError, Tally, evaluate
from .running.speed import Speed, benchmark
from .saving.about import About, SavedModelError, about
from .saving.files import load, save
from .searching.calibrate import Calibrated, CalibrationObserver
from .searching.calibrated import TrialRecord
from .searching.checkpoint import SearchCheckpointError
from .searching.find import Found, search
from .searching.history import EpochRecord, StepRecord
from .searching.loop import NonFiniteLossError, Observer, StoppedError
from .searching.sensitivity import Sensitivity, sensitivity
from .searching.settings import SearchSettingError, SearchSettings

__version__: str

__all__ = [
    "About",
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
    "benchmark",
    "check_predictions",
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
]
