"""SupOnly: the supervised baseline, trained on the labeled images alone."""

from pipeline.batch import Batch
from pipeline.config.schema import Config
from pipeline.methods.base import Losses, Method, Step
from pipeline.models import SegmentationModel


class SupOnly(Method):
    """One network and L = L_s."""

    def __init__(self, config: Config, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.student = self.build_network(features=False)

    def forward(self, batch: Batch, step: Step) -> Losses:
        """L_s of the labeled images."""
        loss = self.supervised(self.student(batch.labeled.image), batch.labeled, step.world)
        return Losses({"supervised": loss}, {})

    def networks(self) -> dict[str, SegmentationModel]:
        """The student alone."""
        return {"student": self.student}
