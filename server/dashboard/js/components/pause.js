// Pause, and resume: neither loses anything, so neither asks.
import { html, useState } from '../../vendor/htm-preact-3.1.1.module.js';
import { visible } from '../format.js';
import { Icon } from './icons.js';

const PAUSABLE = new Set(['queued', 'running']);

export function PauseButton({ view, pause, resume }) {
  const [sending, setSending] = useState(false);
  const [error, setError] = useState(null);
  const isPaused = view.status === 'paused';
  if (view.cancelRequested || !(isPaused || PAUSABLE.has(view.status))) return null;
  if (view.pauseRequested) return html`<button class="btn" disabled><${Icon} name="paused" />Pausing</button>`;
  const send = async () => {
    setSending(true);
    setError(null);
    try {
      await (isPaused ? resume() : pause());
    } catch (failure) {
      setError(failure.message);
    }
    setSending(false);
  };
  const [icon, word, failed] = isPaused ? ['resume', 'Resume', 'Not resumed'] : ['paused', 'Pause', 'Not paused'];
  return html`
    ${error && html`<span class="bad small" role="alert">${failed}: ${visible(error)}</span>`}
    <button class="btn" disabled=${sending} onClick=${send}><${Icon} name=${icon} />${word}</button>`;
}
