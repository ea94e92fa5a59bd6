// Cancel asks once, in place, and names what is kept. `Go on` lies where Cancel was, so a double click does no harm.
import { html, useEffect, useRef, useState } from '../../vendor/htm-preact-3.1.1.module.js';
import { int } from '../format.js';
import { Icon } from './icons.js';

function kept(view, checkpoints) {
  if (!view.step) return 'nothing ran yet';
  const last = Math.max(0, ...checkpoints.map(c => c.step_number));
  return last ? `keep checkpoint ${int(last)}` : 'no checkpoint is kept';
}

export function CancelButton({ view, checkpoints, cancel }) {
  const [asking, setAsking] = useState(false), [sending, setSending] = useState(false), [error, setError] = useState(null), goOn = useRef();
  useEffect(() => {
    if (asking) goOn.current?.focus();
  }, [asking]);
  if (view.over) return null;
  const send = async () => {
    setSending(true);
    setError(null);
    try {
      await cancel();
    } catch (failure) {
      setError(failure.message);
    }
    setAsking(false);
    setSending(false);
  };
  const problem = error && html`<span class="bad small" role="alert">Not cancelled: ${error}</span>`;
  if (view.cancelRequested || sending) return html`<button class="btn danger" disabled><${Icon} name="stop" />Cancelling</button>`;
  if (!asking) return html`${problem}<button class="btn danger" onClick=${() => setAsking(true)}><${Icon} name="stop" />Cancel</button>`;
  return html`<button class="btn danger" onClick=${send}><${Icon} name="stop" />Cancel, ${kept(view, checkpoints)}</button>
    <button class="btn" ref=${goOn} onClick=${() => setAsking(false)}>Go on</button>`;
}
