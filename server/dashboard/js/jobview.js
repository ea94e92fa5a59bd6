// A job of the API as the pages show it: words, figures and memory in one flat object, with null for what is not known.
import { byCategory } from './categories.js';
import { duration, int } from './format.js';

// The API's status, the name of its icon and colour, and the word.
export const STATUSES = {
  validating_files: { key: 'validating', word: 'Validating' },
  queued: { key: 'queued', word: 'Queued' },
  running: { key: 'running', word: 'Running' },
  paused: { key: 'paused', word: 'Paused' },
  succeeded: { key: 'succeeded', word: 'Succeeded' },
  failed: { key: 'failed', word: 'Failed' },
  cancelled: { key: 'cancelled', word: 'Cancelled' },
};

const OPTIMIZERS = { lomo: 'LOMO', adalomo: 'AdaLomo', adamw: 'AdamW', sgd: 'SGD' };
const TERMINAL = new Set(['succeeded', 'failed', 'cancelled']);

export const optimizerName = value => OPTIMIZERS[value] ?? value ?? '';

export const isOver = status => TERMINAL.has(status);

export function jobView(job) {
  const lomo = job.lomo ?? {};
  const memory = lomo.memory ?? {};
  const measured = byCategory(memory.measured);
  const planned = byCategory(memory.planned);
  const begun = lomo.started_at ?? job.created_at;
  const view = {
    id: job.id,
    name: job.user_provided_suffix || job.id,
    status: job.status,
    ...(STATUSES[job.status] ?? { key: 'queued', word: job.status }),
    over: TERMINAL.has(job.status),
    waitingFor: lomo.waiting_for ?? null,
    base: job.model ?? 'unknown model', // null where another version's job cannot be read
    tuned: job.fine_tuned_model,
    step: lomo.step ?? 0,
    steps: lomo.total_steps ?? null,
    loss: lomo.loss ?? null,
    lossNotFinite: lomo.loss == null && (lomo.step ?? 0) > 0,
    tokensPerSecond: lomo.tokens_per_second ?? null,
    eta: lomo.eta_s ?? null,
    trainedTokens: job.trained_tokens,
    createdAt: job.created_at,
    startedAt: lomo.started_at ?? null,
    finishedAt: job.finished_at,
    took: job.finished_at ? job.finished_at - begun : null,
    attempt: lomo.attempt ?? 0,
    cancelRequested: Boolean(lomo.cancel_requested) && !TERMINAL.has(job.status),
    pauseRequested: Boolean(lomo.pause_requested),
    host: lomo.host ?? null,
    device: lomo.device ?? null,
    parameters: lomo.num_parameters ?? null,
    rows: lomo.num_train_rows ?? null,
    optimizer: optimizerName(lomo.optimizer),
    precision: lomo.precision ?? '',
    measured,
    planned,
    peak: lomo.memory?.measured_peak_bytes ?? measured?.peak ?? null,
    plannedPeak: memory.planned_peak_bytes ?? planned?.peak ?? null,
    auto: lomo.auto ?? [],
    limit: lomo.device_bytes ?? null,
    evaluations: lomo.evaluations ?? [],
    curve: lomo.loss_curve ?? [],
    error: job.error,
    wire: job,
  };
  return { ...view, share: shareDone(view) };
}

function shareDone(view) {
  if (view.status === 'succeeded') return 1;
  return view.steps ? Math.min(1, view.step / view.steps) : 0;
}

const WAITS = { memory: 'Waits for memory', slot: 'Waits for a slot', worker: 'Waits for a worker' };

/** What a queued job waits for, and why; the API says `memory: needs 12.3 GiB, ...`, or nothing where a host has room. */
export function waits(view) {
  const [kind, ...reason] = (view.waitingFor ?? '').split(': ');
  const next = view.attempt ? `Waits for attempt ${view.attempt + 1}` : 'Waits for a free worker';
  return [WAITS[kind] ?? next, reason.join(': ')];
}

/** Planned peak over measured peak as text, or null while one of them is not known. */
export const planRatio = view => (view.plannedPeak && view.peak ? (view.plannedPeak / view.peak).toFixed(2) : null);

/** The two texts under a progress bar: what is done or why it stands still, and what is left. */
export function progressText(view) {
  const steps = view.steps ? `${int(view.step)} of ${int(view.steps)}` : '';
  switch (view.status) {
    case 'running':
      if (view.cancelRequested) return ['Stopping as asked', ''];
      if (view.pauseRequested) return ['Pausing as asked', ''];
      if (!view.step) return ['Loading model and data', ''];
      return [steps, view.eta == null ? '' : `about ${duration(view.eta)} left`];
    case 'succeeded':
      return [view.steps ? `${int(view.steps)} steps` : 'Done', view.took == null ? '' : `took ${duration(view.took)}`];
    case 'failed':
      return [view.error?.message ?? 'Failed', ''];
    case 'queued':
      return [waits(view).filter(Boolean).join(': '), ''];
    case 'validating_files':
      return ['Reading the files', ''];
    case 'cancelled':
      return [view.step ? `Cancelled at step ${int(view.step)}` : 'Cancelled before the first step', ''];
    default:
      return [view.step ? `${view.word} at step ${int(view.step)}` : view.word, ''];
  }
}

/** Where a job runs: its host, and its device without PyTorch's index ("cpu (AMD EPYC)" is an AMD EPYC). */
export function deviceName(view) {
  const match = /^(\S+) \((.*)\)$/.exec(view.device ?? '');
  return match ? match[2] : (view.device ?? '');
}

/** Every word a search may hit, in lower case. */
export const searchText = view =>
  [view.name, view.id, view.base, view.tuned, view.host, view.device, view.optimizer]
    .filter(Boolean)
    .join(' ')
    .toLowerCase();
