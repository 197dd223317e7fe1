"""The routers' health while they learn: counts at each step, output norms now and then, alarms."""

from expertly.errors import ExpertlyError
from expertly.models.probe import OutputProbe
from expertly.train.config import TrainConfig
from expertly.train.log import RunLog
from expertly.train.rebalance import Remedy, rebalance
from expertly.train.setup import Job
from expertly.watch.alarms import Alarm, Alarms
from expertly.watch.recorder import Recorder
from expertly.watch.stats import LayerCounts

_LOOK = 10  # steps from one look at the experts' output norms to the next
_TIMES = 3  # rebalancings that a run gets


class Health:
    """What a run knows of its routers. remedy: what earlier collapses have changed."""

    def __init__(self, job: Job, config: TrainConfig, remedy: Remedy):
        assert job.attachment is not None, "a dense model has no routers"
        self._job, self._config = job, config
        self._attachment = job.attachment
        self._probe = OutputProbe(job.model)
        self.recorder = Recorder(job.attachment.rule)
        self.remedy = remedy
        remedy.cap(job.optimizer, job.attachment)
        policy, layers = job.attachment.policy, job.attachment.layers
        assert policy is not None, "a run's policy is always attached"
        self.alarms = Alarms(len(layers), layers[0].num_experts, policy.top_k)

    def look(self, step: int) -> None:
        """Before the step after `step` others: have the experts' outputs measured in it, if due."""
        self._probe.read()  # a step that was refused was not heeded: no later one takes its norms
        if (step + 1) % _LOOK == 0:
            self._probe.arm()

    def heed(self, step: int, counts: LayerCounts, log: RunLog) -> bool:
        """Judge a step's counts: say what is new, and do about a collapse what was asked for.

        Returns whether routers were drawn anew. Raises E503 for a collapse that ends the run.
        """
        raised, cleared = self.alarms.add(step, counts, self._probe.read())
        for alarm in raised:
            log.metrics({"step": step, "alarm": alarm._asdict()})
            log.say(f"alarm at step {step}: {alarm.kind}: {alarm.what}. Advice: {alarm.advice}")
        self._clear(step, cleared, log)
        if self._config.router.on_collapse == "warn":
            return False
        collapsed = [alarm for alarm in self.alarms.open if alarm.kind == "collapse"]
        if not collapsed:
            return False
        self._remedy(step, collapsed, log)
        return True

    def _clear(self, step: int, cleared: list[tuple[str, int]], log: RunLog) -> None:
        for kind, layer in cleared:
            log.metrics({"step": step, "cleared": {"kind": kind, "layer": layer}})
            log.say(f"alarm cleared at step {step}: {kind} in layer {layer}")

    def _remedy(self, step: int, collapsed: list[Alarm], log: RunLog) -> None:
        """Draw the collapsed routers anew, or raise E503."""
        if self._config.router.on_collapse == "stop" or self.remedy.times == _TIMES:
            what = f"step {step}, {collapsed[0].what}"
            why, fix = "router.on_collapse=stop", "go on with --resume router.on_collapse=rebalance"
            if self.remedy.times:
                why = f"again after {self.remedy.times} rebalancings"
                fix = "start a new run with a lower optim.router_learning_rate"
            raise ExpertlyError("E503", what, why, fix=fix)
        layers = [alarm.layer for alarm in collapsed]
        rebalance(self._job.model, self._attachment, self._job.optimizer, layers)
        self.remedy = self.remedy.after(self._config.optim, layers)
        self.remedy.cap(self._job.optimizer, self._attachment)
        self._clear(step, self.alarms.reset(layers), log)
        remedy = self.remedy
        log.metrics({"step": step, "rebalanced": {"layers": layers}})
        log.say(
            f"rebalanced at step {step}: routers of layers {layers} drawn anew, "
            f"router_aux_loss_coef at least {remedy.aux_floor:g}, "
            f"router_learning_rate at most {remedy.router_lr_cap:g}"
        )
