"""What modalities-core registers: names to where the code is; importing nothing."""

COMPONENTS: dict[str, str] = {
    "world.alone": "modalities_core.training.world:Alone",
    "executor.plain": "modalities_core.training.executor:Plain",
    "optimizer.adamw": "modalities_core.training.optim:adamw",
    "schedule.constant": "modalities_core.training.schedule:Constant",
    "schedule.linear": "modalities_core.training.schedule:Linear",
    "schedule.warmup_cosine": "modalities_core.training.schedule:WarmupCosine",
    "schedule.wsd": "modalities_core.training.schedule:WarmupStableDecay",
    "schedule.step": "modalities_core.training.schedule:Step",
    "schedule.one_cycle": "modalities_core.training.schedule:OneCycle",
    "evaluation.held_out": "modalities_core.training.evaluator:Evaluation",
    "checkpoints.keep": "modalities_core.training.checkpointing:Checkpoints",
    "trainer.default": "modalities_core.training.trainer:Trainer",
    "sink.console": "modalities_core.sinks.console:Console",
    "sink.jsonl": "modalities_core.sinks.jsonl:JsonLines",
}
