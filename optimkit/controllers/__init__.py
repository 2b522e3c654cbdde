"""What decides on the host while training runs, from losses, with snapshots and restarts.

SciPy and scikit-learn load on first use: ``pip install "optimkit[controllers]"``.
"""

from optimkit.controllers.advantage_shaping import RankMeasures as RankMeasures
from optimkit.controllers.advantage_shaping import rank_advantage_shaping as rank_advantage_shaping
from optimkit.controllers.advantage_shaping import update_rank_means as update_rank_means
from optimkit.controllers.autolrs import AutoLRSController as AutoLRSController
from optimkit.controllers.autolrs import Command as Command
from optimkit.controllers.forecast import Forecast as Forecast
from optimkit.controllers.forecast import drop_outliers as drop_outliers
from optimkit.controllers.forecast import exponential_forecast as exponential_forecast
from optimkit.controllers.leap import LeapController as LeapController
from optimkit.controllers.leap import LeapDecision as LeapDecision
from optimkit.controllers.outer import OuterAccelerator as OuterAccelerator
from optimkit.controllers.outer import OuterState as OuterState
from optimkit.controllers.outer import accelerate_outer as accelerate_outer
from optimkit.controllers.outer import extrapolate_log_policy as extrapolate_log_policy
from optimkit.controllers.outer import extrapolate_policy as extrapolate_policy
from optimkit.controllers.predictors import extrapolate_parameters as extrapolate_parameters
from optimkit.controllers.predictors import predict_adam_momentum as predict_adam_momentum
from optimkit.controllers.predictors import predict_linear as predict_linear
from optimkit.controllers.predictors import predict_quadratic as predict_quadratic
from optimkit.controllers.regimes import activation_similarity as activation_similarity
from optimkit.controllers.regimes import activation_variance as activation_variance
from optimkit.controllers.regimes import calibrate_thresholds as calibrate_thresholds
from optimkit.controllers.regimes import loss_curvature as loss_curvature
from optimkit.controllers.regimes import regime_from_similarity as regime_from_similarity
from optimkit.controllers.rehearsal import power_law_sampler as power_law_sampler
from optimkit.controllers.rehearsal import rehearsal_probabilities as rehearsal_probabilities
from optimkit.controllers.run import AutoLRSTraining as AutoLRSTraining
from optimkit.controllers.run import run_autolrs as run_autolrs
from optimkit.controllers.suggest import gp_lcb_suggest as gp_lcb_suggest
from optimkit.controllers.suggest import gp_posterior as gp_posterior
from optimkit.controllers.verify import Verdict as Verdict
from optimkit.controllers.verify import accept as accept
from optimkit.controllers.verify import verify_then_accept as verify_then_accept
