# SPDX-License-Identifier: Apache-2.0
"""Out-of-distribution detection for image classifiers, with decisions that keep a stated promise."""

from detector.calibrating import calibrate as calibrate
from detector.detector import Detector as Detector
from detector.evaluation import OodSet as OodSet, evaluate as evaluate
from detector.fitting import Network as Network, fit as fit
from detector.gated import GatedModel as GatedModel, GatedOutput as GatedOutput
from detector.policy import Policy as Policy, Verdict as Verdict

__version__ = "0.1.0"
