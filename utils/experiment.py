"""One training run, from its directory on disk to its summary: what the three entry points are made of.

`Experiment` decides when to train, log, evaluate and save, and composes the modules that do each: compiled chunks
(`training`), batches (`batches`), checkpoints, metrics, evaluation. It imports no simulator: environments and raw
data come in as functions.

Where a run starts is settled in one place, `_start`, in this order:
  1. the run directory's own latest checkpoint (the same command again resumes);
  2. `--restore_path`;
  3. scratch.
"""

import contextlib
import math
import signal
import time
from pathlib import Path

import jax
import numpy as np
from absl import logging

import agents as agent_registry
from utils import batches, checkpoints, datasets, devices, diagnostics, processes, resume, run_files, training
from utils.errors import TrainingDiverged, UserError
from utils.normalizers import Normalizer
from utils.profiling import Profile
from utils.progress import progress_bar
from utils.run_evaluations import RunEvaluations
from utils.run_log import RunLog, interval_lines


class Experiment:
    """A run of `seeds` seeds, trained side by side; use as a context manager.

    config: `run_config.RunConfig`. task: `envs.TaskSpec`. load_raw(phase, split, max_transitions) → raw arrays.
    make_evaluator() → `evaluation.Evaluator`. record_video(policy, path) writes one file; the last two may be None for
    runs that do not evaluate.
    """

    def __init__(self, config, task, *, load_raw, make_evaluator=None, record_video=None, first_phase='pretraining'):
        self.config, self.task = config, task
        self._load_raw, self._make_evaluator, self._record_video = load_raw, make_evaluator, record_video
        self._first_phase = first_phase
        self.seeds = list(range(config.seed, config.seed + config.num_seeds))
        self.mesh = devices.make_mesh(config.num_seeds, config.agent.batch_size, config.mesh_seeds, config.mesh_batch)
        self.agents = self.normalizer = self._evaluations = None
        self.phase, self.phase_step = 'pretraining', 0
        self.offset = 0  # Steps of the phases before this one: step = offset + phase_step.
        self.fingerprints = {}
        self._partial = []  # Means of the chunks since the last log line.
        self._last_checkpoint = None
        self._last_return = None
        self._evaluation_due = False
        self._signal = self._stop_signal = None  # The one received, and the one to act on.
        self._began, self._wall_before = time.monotonic(), 0.0
        self._resources = contextlib.ExitStack()

    # ------------------------------------------------------------------------------------------- entering and leaving

    def __enter__(self):
        config = self.config
        with self._resources as resources:
            self.directory, self.log, self.writer = resources.enter_context(run_files.opened(config))
            for number in (signal.SIGTERM, signal.SIGINT):
                resources.callback(signal.signal, number, signal.signal(number, self._on_signal))
            self._start()
            self.wandb = run_files.open_wandb(self.directory, config)
            resources.callback(self.wandb.finish)
            self.lines = RunLog(self.log, self.wandb, self.seeds)
            self._resources = resources.pop_all()  # Nothing failed: all of it stays open.
        return self

    def __exit__(self, error_type, error, _):
        with self._resources:
            if error_type is None:
                self.writer.wait()
                run_files.write_summary(self.directory)
            processes.explain(error, self._last_checkpoint)

    def _on_signal(self, number, frame):
        if self._signal == signal.SIGINT:  # A second Ctrl-C does not wait for the chunk to end.
            raise KeyboardInterrupt
        self._signal = number
        if jax.process_count() == 1:  # Several stop at the same step: `_train` has them agree.
            self._stop_signal = number

    # ------------------------------------------------------------------------------------------------------- starting

    def _start(self):
        """Restores or creates the agents, in the order at the head of this file."""
        config, first_phase = self.config, self._first_phase
        own = checkpoints.latest_step(self.directory / 'checkpoints')
        meta = None
        if own is not None:
            origin, path = 'this run’s own checkpoint', self.directory / 'checkpoints' / str(own)
            meta = resume.read_meta(path, own=True)
            resume.check_length(meta, config, self.directory)
            resume.check_same_run(self.directory, config)
        elif (self.directory / 'summary.json').exists():
            raise UserError(
                f'{self.directory} holds a finished run without its checkpoints, which cannot go on: '
                'use another --run_name, or delete the directory'
            )
        elif config.restore_path is not None:
            origin, path = '--restore_path', checkpoints.resolve(Path(config.restore_path), phase='pretraining')
            meta = resume.read_meta(path)
            if meta['phase'] != 'pretraining':
                raise UserError(f'{path} is a checkpoint of fine-tuning: --restore_path takes one of pre-training')
        elif first_phase == 'finetuning':
            raise UserError(
                'fine-tuning needs a pre-trained run: give --restore_path=<directory of a pretrain.py or main.py run>'
            )
        else:
            origin, path = 'scratch', None
        if meta is not None:
            resume.check_compatible(meta, self.task, config, path)
            self.normalizer = Normalizer.from_dict(meta['normalizer'])
            self.phase, self.phase_step, self.offset = meta['phase'], meta['phase_step'], meta['offset']
            self._last_checkpoint = path
        if own is not None:
            self._partial = [
                {name: [float(mean) for mean in means] for name, means in chunk.items()}
                for chunk in meta['partial_metrics']
            ]
            self._wall_before = meta['wall_seconds']
            self._evaluation_due = meta['evaluation_due']
        self.finished_pretraining = self.phase == 'finetuning' or first_phase == 'finetuning'

        # The phase that comes next decides which data the template agent is made from; restored values replace all of
        # it.
        self._data = self._load_phase('finetuning' if self.finished_pretraining else 'pretraining')
        if own is not None:
            resume.check_same_data(meta['data'], self.fingerprints, self.directory)
            self.fingerprints = {**meta['data'], **self.fingerprints}
        agent_class = agent_registry.load(config.agent_name).AGENT
        example = datasets.example_batch(self._data[1])
        agents = training.create_agents(agent_class, self.seeds, example, config.agent)
        self.agents = devices.place(agents, self.mesh, 'seed')
        if path is not None:
            # A pre-training has no say in what belongs to fine-tuning alone.
            optional = getattr(self.agents, 'finetuning_state', ()) if own is None else ()
            self.agents = checkpoints.restore(path, self.agents, optional)
        if own is not None:
            self._start_info = resume.check_start(meta, config, self.directory)
        else:
            self._start_info = resume.start_info(path, meta, config.pretraining_steps)
        # Nothing failed: from here on the directory is this start's.
        if processes.is_first():
            (self.directory / 'summary.json').unlink(missing_ok=True)  # Of a shorter run, or of lines that go now.
        self.log.truncate(meta['metrics_lines'] if own is not None else 0)
        self._write_config()
        for line in config.describe().splitlines():
            logging.info('%s', line)
        logging.info('run directory: %s', self.directory)
        logging.info('devices: %s', devices.describe(self.mesh))
        logging.info('start: %s%s, %s step %d', origin, f' ({path})' if path else '', self.phase, self.phase_step)

    def _write_config(self):
        run_files.write_config(self.directory, self.config, start=self._start_info, data=self.fingerprints)

    def _load_phase(self, phase):
        """(phase, training set, validation set) in the host's memory; fits the normaliser if there is none yet."""
        config = self.config
        size = config.pretraining_size if phase == 'pretraining' else config.finetuning_size
        raw = {}
        for split in ('train', 'val'):
            raw[split] = self._load_raw(phase, split, size if split == 'train' else None)
            self.fingerprints[f'{phase}/{split}'] = raw[split]['source']
        if config.obs_norm_per_split:
            normalizers = {k: Normalizer.fit(v['observations'], config.obs_norm_type) for k, v in raw.items()}
        else:
            normalizers = dict.fromkeys(raw, self.normalizer or self._fit_normalizer(phase, raw['train']))
        self.normalizer = normalizers['train']
        options = {
            'reward_at': self.task.reward_at,
            'frame_stack': config.frame_stack,
            'next_actions_across_episodes': config.next_actions_across_episodes,
        }
        sets = [
            datasets.Dataset.create(raw['train'], normalizers['train'], p_aug=config.p_aug, **options),
            datasets.Dataset.create(raw['val'], normalizers['val'], **options),
        ]
        logging.info('%s data: %d transitions, validation %d', phase, *(dataset.num_transitions for dataset in sets))
        if config.agent.get('absorbing_ends') and np.any(labels := sets[0].end_labels):
            logging.warning(
                'the task ends with labels other than 0, of %g on average: the state that it ends in counts for ever, '
                'and so does its label, times 1/(1-discount) in Q (--agent.absorbing_ends=False: futures go on past '
                'the end, as published)',
                labels.mean(),
            )
        return (phase, *sets)

    def _fit_normalizer(self, phase, training_rows):
        """The run's one normaliser: of the pre-training set, whichever phase comes first."""
        if phase != 'pretraining':
            training_rows = self._load_raw('pretraining', 'train', self.config.pretraining_size)
        return Normalizer.fit(training_rows['observations'], self.config.obs_norm_type)

    # ----------------------------------------------------------------------------------------------------- the phases

    def pretrain(self):
        """Reward-free pre-training up to `pretraining_steps`; ends with a checkpoint that is kept."""
        if self.finished_pretraining:
            return
        self._train('pretraining', self.config.pretraining_steps)
        self.finished_pretraining = True

    def finetune(self):
        """Fine-tuning up to `finetuning_steps`, evaluated before the first step, at every `eval_interval`, and at the
        end."""
        total = self.config.finetuning_steps
        if total == 0:
            return
        if self.phase == 'finetuning' and self.phase_step >= total and not self._evaluation_due:
            logging.info('this run is complete at step %d: nothing to train', self.offset + self.phase_step)
            return
        if self._data[0] != 'finetuning':
            self._data = None  # Frees the pre-training data before the labelled data come in.
            self._data = self._load_phase('finetuning')
            self._write_config()  # Now with the fingerprints of the labelled data.
        if self.phase != 'finetuning':
            self.offset, self.phase, self.phase_step = self.phase_step, 'finetuning', 0
            keys = training.stream_keys(self.seeds, 'begin_finetuning')
            # Drawn on the host: once, and the data set may be larger than the device.
            self.agents = training.begin_finetuning(
                self.agents, batches.on_host(self._data[1]), keys, self.config.obs_norm_per_split
            )
            self._evaluation_due = True
        if self._evaluation_due:
            done = self._evaluate(overlap=self.phase_step < total)
            if not done and self._stop_signal:
                self._stop()  # What led here is on disk already.
            if self.phase_step >= total:
                self._save(keep=True)  # Or the next start would evaluate again. All processes: they gather the agents.
        processes.wait_for_all()
        self._train('finetuning', total)

    def _train(self, phase, total):
        """The loop: dispatch a chunk, then look at the metrics of the one before it while the device is busy."""
        config = self.config
        if self.phase_step >= total:
            return
        keys = training.stream_keys(self.seeds, phase)
        ranges = devices.place(diagnostics.observed_ranges(self._data[1]), self.mesh)
        source = self._make_source(phase, keys)
        keys = devices.place(keys, self.mesh, 'seed')
        n = chunk = None  # Updates of the next chunk, and the program for as many.
        validation = devices.place(self._data[2], self.mesh)
        validation_keys = devices.place(training.stream_keys(self.seeds, 'validation'), self.mesh, 'seed')
        validate = None
        bar = progress_bar(
            phase, total, 'updates', initial=self.phase_step, unit_scale=False, disable=not processes.is_first()
        )
        in_flight = None  # (end step, device metrics, validation metrics or None) of the chunk that is running.
        self._start_timing(self.phase_step)
        profile = Profile(self.directory / 'profile' / phase, config.profile if processes.is_first() else 0)
        with bar, contextlib.closing(source), contextlib.closing(profile):
            while self.phase_step < total:
                drawn_from = source.chunk(self.phase_step)
                # A process with other chunks may have stopped the run between two multiples of this one's.
                if n != (n := batches.to_next_multiple(self.phase_step, source.n)):
                    chunk, seconds = training.compile_chunk(self.agents, drawn_from, keys, phase=phase, n=n)
                    logging.info('%s: compiled a chunk of %d updates in %.1f s', phase, n, seconds)
                    self._paused += seconds
                profile.before_chunk(self.agents, n)
                self.agents, metrics = chunk(self.agents, drawn_from, keys, np.int32(self.phase_step))
                self.phase_step += n
                if validate is None:  # Compiled while the device is busy with the first chunk.
                    validate = training.compile_validation(
                        self.agents, validation, ranges, validation_keys, phase=phase
                    )
                    jax.block_until_ready(metrics)
                    self._start_timing(self.phase_step)  # The speed is that of the chunks from the second on.
                if in_flight is not None:
                    self._collect(*in_flight, bar)
                ends = self.phase_step >= total
                logs = self.phase_step % config.log_interval == 0
                keeps = ends or (config.keep_interval > 0 and self.phase_step % config.keep_interval == 0)
                saves = keeps or self.phase_step % config.save_interval == 0
                evaluates = phase == 'finetuning' and self.phase_step % config.eval_interval == 0
                validated = None
                if logs or ends:  # Before the next chunk: it is given the agents' buffers.
                    validated = validate(self.agents, validation, ranges, validation_keys, np.int32(self.phase_step))
                in_flight = (self.phase_step, metrics, validated)
                if logs and jax.process_count() > 1:
                    self._stop_signal = processes.agree(self._signal or 0) or None
                if evaluates or saves or self._stop_signal:
                    self._collect(*in_flight, bar)
                    in_flight = None
                    paused = time.perf_counter()
                    due = phase == 'finetuning' and (evaluates or ends) and not self._evaluate(overlap=not ends)
                    if not due:
                        self._finish_evaluation()  # Of an earlier step, which is not what a checkpoint would hold.
                    stops = self._stop_signal is not None  # Read once: one that comes later stops the next chunk.
                    if saves or stops:
                        self._save(keep=keeps, evaluation_due=due)
                    self._paused += time.perf_counter() - paused
                    processes.wait_for_all()
                    if stops:
                        self._stop()

    def _make_source(self, phase, keys):
        """The training set where `--dataset_location` wants it."""
        dataset, n = self._data[1], self.config.chunk_size
        location = batches.choose_location(dataset, self.config.dataset_location)
        if processes.agree(int(location == 'host')):  # Not every process may have the same device.
            location = 'host'
        logging.info('%s: batches are drawn from data on the %s', phase, location)
        if location == 'device':
            self._data = (phase, None, self._data[2])  # The host's copy has served.
            return batches.DeviceBatches(dataset, n, self.mesh)
        return batches.HostBatches(dataset, n, agents=self.agents, keys=keys, block=self.config.block)

    def _collect(self, end_step, metrics, validated, bar):
        """Fetches one chunk's metrics, stops on NaN, and writes a log line where an interval ends."""
        self._finish_evaluation(wait=False)
        metrics = jax.device_get(metrics)
        self._check_finite(metrics)
        self._partial.append({name: np.asarray(mean, np.float64).tolist() for name, (mean, _) in metrics.items()})
        bar.update(end_step - bar.n)
        if validated is None:
            return
        validated = jax.device_get(validated)
        seconds = time.perf_counter() - self._timed_since - self._paused
        timed = end_step - self._timed_from
        updates_per_second = timed / max(seconds, 1e-9) if timed else math.nan  # NaN is null in the log.
        self._start_timing(end_step)
        lines = interval_lines(self._partial, validated, updates_per_second, len(self.seeds))
        self.lines.write(self.offset + end_step, self.phase, lines, self._wall_seconds)
        self._partial = []
        bar.set_postfix(
            ({'updates/s': f'{updates_per_second:.0f}'} if timed else {})
            | ({} if self._last_return is None else {'return': self._last_return}),
            refresh=False,
        )

    def _start_timing(self, step):
        """The next line's speed is that of the updates after `step`, without what adds to `_paused` meanwhile."""
        self._timed_from, self._timed_since, self._paused = step, time.perf_counter(), 0.0

    @property
    def _wall_seconds(self):
        """Running time of the run so far, earlier starts included."""
        return self._wall_before + time.monotonic() - self._began

    def _check_finite(self, metrics):
        bad = {
            name: int(first[first >= 0].min()) for name, (_, first) in metrics.items() if np.any(np.asarray(first) >= 0)
        }
        if not bad:
            return
        step = min(bad.values())
        names = ', '.join(sorted(name for name, first in bad.items() if first == step))
        seeds = [s for i, s in enumerate(self.seeds) if any(first[i] >= 0 for _, first in metrics.values())]
        last = 'none was written yet' if self._last_checkpoint is None else str(self._last_checkpoint)
        message = (
            f'{self.phase} diverged at step {self.offset + step + 1} (seeds {seeds}): training/{names} is not finite; '
            f'last good checkpoint: {last}'
        )
        if self.config.nan_policy == 'stop':
            self._finish_evaluation()
            raise TrainingDiverged(message)
        logging.warning('%s; --nan_policy=warn: training goes on', message)

    # ----------------------------------------------------------------------------------- evaluating, saving, stopping

    def _evaluate(self, overlap) -> bool:
        """Evaluates every seed and logs it. False if that is still due: a stop signal cut it short, or, with `overlap`
        and `--eval_async`, it has only been begun."""
        if self._make_evaluator is None:
            return True
        if self._evaluations is None:
            evaluations = RunEvaluations(
                self._make_evaluator,
                self.normalizer,
                self.seeds,
                self.config.eval_episodes,
                record_video=self._record_video if self.config.video_episodes > 0 else None,
                video_dir=self.directory / 'videos',
                in_background=self.config.eval_async,
            )
            self._evaluations = self._resources.enter_context(contextlib.closing(evaluations))
        self._finish_evaluation()
        overlaps = overlap and self.config.eval_async and not self._stop_signal
        # One that overlaps training is finished in spite of a signal: its policy is not in the next checkpoint.
        should_stop = (lambda: False) if overlaps else (lambda: self._stop_signal is not None)
        example = datasets.gather_observations(self._data[2], np.zeros(1, np.int32))
        self._evaluations.begin(self.agents, self.offset + self.phase_step, example, should_stop)
        self.lines.hold()
        return not overlaps and self._finish_evaluation()

    def _finish_evaluation(self, wait=True) -> bool:
        """Logs the evaluation that was begun, if it is over or `wait`; False if a stop signal had cut it short."""
        evaluation = None if self._evaluations is None else self._evaluations.finish(wait)
        if evaluation is None:
            return True
        step, results, video = evaluation
        if results is None:
            self.lines.release()
            return False
        lines = [{f'evaluation/{k}': v for k, v in result.items()} for result in results]
        self.lines.release(step, 'finetuning', lines, self._wall_seconds)
        means = {name: float(np.mean([result[name] for result in results])) for name in results[0]}
        self._last_return = f'{means["episode.return"]:.1f}'
        logging.info(
            'evaluation at step %d: %s', step, ', '.join(f'{name} {value:.2f}' for name, value in means.items())
        )
        if video is not None:
            self.wandb.log_video(step, video)
        return True

    def _save(self, *, keep, evaluation_due=False):
        step = self.offset + self.phase_step
        meta = {
            'phase': self.phase,
            'phase_step': self.phase_step,
            'offset': self.offset,
            'env_name': self.task.name,
            'domain': self.task.domain,
            'agent_name': self.config.agent_name,
            'agent_config': self.config.to_dict()['agent'],
            'normalizer': self.normalizer.to_dict(),
            'frame_stack': self.config.frame_stack,
            'data': self.fingerprints,
            'seed': self.config.seed,
            'num_seeds': self.config.num_seeds,
            'start': self._start_info,
            'evaluation_due': evaluation_due,
            'metrics_lines': self.log.lines,
            # JSON knows no NaN and no infinity: these as words, which `float` reads.
            'partial_metrics': [
                {name: [mean if math.isfinite(mean) else str(mean) for mean in means] for name, means in chunk.items()}
                for chunk in self._partial
            ],
            'wall_seconds': self._wall_seconds,
        }
        self.writer.save(step, devices.gather(self.agents), meta, keep=keep)
        self._last_checkpoint = self.directory / 'checkpoints' / str(step)

    def _stop(self):
        """After SIGTERM or Ctrl-C: the checkpoint is on disk before the process ends."""
        self.writer.wait()
        name = signal.Signals(self._stop_signal).name
        step = self.offset + self.phase_step
        if processes.is_first():
            print(
                f'{name}: stopped at step {step} of {self.directory}; run the same command again to resume', flush=True
            )
        raise SystemExit(0)
