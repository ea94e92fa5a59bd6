// The figures of a run by step, as columns with one common x: read once from /metrics, then grown by the events. Steps
// at which there was only an evaluation have nulls in the other columns.
import { CATEGORIES } from './categories.js';

const COLUMNS = [
  'step',
  'attempt',
  'time',
  'loss',
  'loss_min',
  'loss_max',
  'learning_rate',
  'grad_norm',
  'tokens_per_s',
  ...CATEGORIES.map(c => c.field),
  'peak_bytes',
];

/** Whether an event is one update of the weights; others may carry figures of memory, too. */
export const isStep = event => event.type === 'metrics' && event.data?.step_s != null;

export class Series {
  #rows = new Map(); // by step; a repeated step (after a resume) replaces the earlier one
  #evaluations = new Map();

  /** Take the answer of /metrics; with `window`, only its steps replace what is known there. */
  load({ columns, evaluations }, window = null) {
    if (window) {
      for (const step of [...this.#rows.keys()]) if (step >= window[0] && step <= window[1]) this.#rows.delete(step);
    } else {
      // What the stream brought meanwhile is newer than the answer.
      const newest = Math.max(-1, ...(columns.step ?? []));
      for (const step of [...this.#rows.keys()]) if (step <= newest) this.#rows.delete(step);
    }
    (columns.step ?? []).forEach((step, i) => {
      this.#rows.set(step, Object.fromEntries(COLUMNS.map(name => [name, columns[name]?.[i] ?? null])));
    });
    for (const evaluation of evaluations ?? []) this.evaluation(evaluation);
  }

  /** Take the data of a step event. */
  step(data, { attempt, time }) {
    this.#rows.set(data.step, {
      ...data,
      ...data.memory,
      attempt,
      time,
      loss_min: data.loss,
      loss_max: data.loss,
    });
  }

  evaluation(evaluation) {
    this.#evaluations.set(evaluation.step, evaluation);
  }

  get numSteps() {
    return this.#rows.size;
  }

  get evaluations() {
    return [...this.#evaluations.values()].sort((a, b) => a.step - b.step);
  }

  /** Columns for the charts, a fresh object each time, or null while there is no step. */
  columns() {
    if (!this.#rows.size) return null;
    const steps = [...new Set([...this.#rows.keys(), ...this.#evaluations.keys()])].sort((a, b) => a - b);
    const columns = Object.fromEntries(
      COLUMNS.map(name => [name, steps.map(step => this.#rows.get(step)?.[name] ?? null)]),
    );
    return { ...columns, step: steps, valid: steps.map(step => this.#evaluations.get(step)?.valid_loss ?? null) };
  }
}

/** Exponential moving average that passes over nulls; `share` of the past is kept. */
export function smooth(values, share) {
  let state = null;
  return values.map(value => {
    if (value === null) return null;
    state = state === null ? value : share * state + (1 - share) * value;
    return state;
  });
}

/** The value at `index`, or the nearest one before it; null where there is none. */
export function valueAt(values, index) {
  for (let i = Math.min(index, values.length - 1); i >= 0; i--) if (values[i] !== null) return values[i];
  return null;
}

/** Where an attempt after the first begins: `[{step, attempt}]`. */
export function attemptStarts(columns) {
  const starts = [];
  let current = null;
  columns.attempt.forEach((attempt, i) => {
    if (attempt === null) return;
    if (current !== null && attempt !== current) starts.push({ step: columns.step[i], attempt });
    current = attempt;
  });
  return starts;
}
