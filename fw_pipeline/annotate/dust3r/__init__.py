"""DUSt3R: two photographs in, two pointmaps in the first one's camera out.

`DUSt3R` is the network, `prepare` brings photographs or video frames to the size and range it reads, `Dust3rEngine` makes
cameras and depth of a clip from them.
"""

from fw_pipeline.annotate.dust3r.config import DUSt3RConfig
from fw_pipeline.annotate.dust3r.engine import Dust3rEngine, PairNetwork
from fw_pipeline.annotate.dust3r.images import PreparedImages, network_size, prepare
from fw_pipeline.annotate.dust3r.network import DUSt3R, Pointmap
from fw_pipeline.annotate.dust3r.weights import DUSt3RWeightsError

__all__ = [
    "DUSt3R",
    "DUSt3RConfig",
    "DUSt3RWeightsError",
    "Dust3rEngine",
    "PairNetwork",
    "Pointmap",
    "PreparedImages",
    "network_size",
    "prepare",
]
