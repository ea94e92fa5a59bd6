// Cancel asks once, in place, and names what is kept. `Go on` lies where Cancel was, so a double click does no harm.
import { html, useEffect, useRef, useState } from '../../vendor/htm-preact-3.1.1.module.js';
import { int, visible } from '../format.js';
import { Icon } from './icons.js';

function kept(view, checkpoints) {
  if (!view.step) return 'nothing ran yet';
  const last = Math.max(0, ...checkpoints.map(c => c.step_number));
  return last ? `keep checkpoint ${int(last)}` : 'no checkpoint is kept';
}

export function CancelButton({ view, checkpoints, cancel }) {
  const [asking, setAsking] = useState(false);
  const [sending, setSending] = useState(false);
  const [error, setError] = useState(null);
  const goOn = useRef();
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
  const button = (text, onClick) => html`
    <button class="btn danger" disabled=${!onClick} onClick=${onClick}><${Icon} name="stop" />${text}</button>`;
  if (view.cancelRequested || sending) return button('Cancelling', null);
  if (!asking) {
    const problem = error && html`<span class="bad small" role="alert">Not cancelled: ${visible(error)}</span>`;
    return html`${problem}${button('Cancel', () => setAsking(true))}`;
  }
  return html`
    ${button(`Cancel, ${kept(view, checkpoints)}`, send)}
    <button class="btn" ref=${goOn} onClick=${() => setAsking(false)}>Go on</button>`;
}
