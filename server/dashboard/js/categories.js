// The memory categories: one order, one colour and one name on every page and in the terminal.

export const CATEGORIES = [
  { key: 'params', field: 'parameters_bytes', name: 'Parameters' },
  { key: 'grads', field: 'gradients_bytes', name: 'Gradients' },
  { key: 'optim', field: 'optimizer_bytes', name: 'Optimizer state' },
  { key: 'acts', field: 'activations_bytes', name: 'Activations' },
  { key: 'other', field: 'other_bytes', name: 'Other' },
];

// In a stacked chart the flat ones lie below: parameters, other, activations, optimizer state, gradients.
export const STACK_ORDER = [0, 4, 3, 2, 1];

/** `MemoryBytes` of the wire as `{params, grads, optim, acts, other, peak}` in bytes, or null where it is not known. */
export function byCategory(memory) {
  if (!memory || memory.parameters_bytes == null) return null;
  const parts = Object.fromEntries(CATEGORIES.map(c => [c.key, Math.max(0, memory[c.field] ?? 0)]));
  return { ...parts, peak: memory.peak_bytes ?? CATEGORIES.reduce((sum, c) => sum + parts[c.key], 0) };
}

export const sumOf = parts => CATEGORIES.reduce((sum, c) => sum + parts[c.key], 0);
