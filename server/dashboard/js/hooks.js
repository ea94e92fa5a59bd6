// Hooks that several components use.
import { useEffect, useState } from '../vendor/htm-preact-3.1.1.module.js';

/** The time in seconds, renewed every `everyMs`: relative times and count-downs follow it. */
export function useNow(everyMs) {
  const [now, setNow] = useState(Date.now() / 1000);
  useEffect(() => {
    const timer = setInterval(() => setNow(Date.now() / 1000), everyMs);
    return () => clearInterval(timer);
  }, [everyMs]);
  return now;
}

/** False at first, true after `ms`: a skeleton that would only flash isn't drawn. */
export function useAfter(ms) {
  const [late, setLate] = useState(false);
  useEffect(() => {
    const timer = setTimeout(() => setLate(true), ms);
    return () => clearTimeout(timer);
  }, [ms]);
  return late;
}

/** Listen for keys that are commands: none while the reader types, none with modifiers. Esc leaves a field. */
export function useKeys(commands) {
  useEffect(() => {
    const onKey = event => {
      if (/INPUT|SELECT|TEXTAREA/.test(event.target.tagName) && event.target.type !== 'checkbox') {
        if (event.key === 'Escape') event.target.blur();
        return;
      }
      if (event.metaKey || event.ctrlKey || event.altKey) return;
      commands[event.key]?.(event);
    };
    addEventListener('keydown', onKey);
    return () => removeEventListener('keydown', onKey);
  });
}
