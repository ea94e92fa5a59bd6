// Numbers and times as text: one place, so that every page says them in the same way. Missing values are a dash.

export const MISSING = '–';

const present = value => value != null && Number.isFinite(value);

/** Bytes as GB (10^9) without the unit: two decimals below 10, one below 100, none above. */
export function gb(bytes) {
  if (!present(bytes)) return MISSING;
  const value = bytes / 1e9;
  return value >= 99.95 ? value.toFixed(0) : value >= 9.995 ? value.toFixed(1) : value.toFixed(2);
}

/** An integer with thousands separated. */
export const int = value => (present(value) ? Math.round(value).toLocaleString('en-US') : MISSING);

export const loss = value => (present(value) ? value.toFixed(3) : MISSING);

export const fixed = (value, digits) => (present(value) ? value.toFixed(digits) : MISSING);

export const percent = share => (present(share) ? `${(100 * share).toFixed(1)} %` : MISSING);

/** A learning rate: three digits, in exponent form where it is small. */
export function rate(value) {
  if (!present(value)) return MISSING;
  return value === 0 || value >= 1e-3 ? String(+value.toPrecision(3)) : value.toExponential(2);
}

/** Short form for axes and counts: 12k, 134.5M. */
export function short(value) {
  if (!present(value)) return MISSING;
  for (const [size, unit] of [
    [1e9, 'B'],
    [1e6, 'M'],
    [1e3, 'k'],
  ]) {
    if (value >= size) return +(value / size).toFixed(1) + unit;
  }
  return String(Math.round(value));
}

/** A length of time in seconds: 42 s, 31 min, 3 h 28, 2 d. */
export function duration(seconds) {
  if (!present(seconds)) return MISSING;
  const s = Math.max(0, seconds);
  if (s < 90) return `${Math.round(s)} s`;
  const minutes = Math.round(s / 60);
  if (minutes < 90) return `${minutes} min`;
  if (s < 129_600) return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, '0')}`;
  return `${Math.round(s / 86_400)} d`;
}

/** How long ago in words without "ago": now, 12 min, 6 h, 3 d. */
export function age(seconds) {
  if (!present(seconds)) return MISSING;
  const minutes = Math.floor(Math.max(0, seconds) / 60);
  if (minutes < 1) return 'now';
  if (minutes < 90) return `${minutes} min`;
  return minutes < 2160 ? `${Math.round(minutes / 60)} h` : `${Math.round(minutes / 1440)} d`;
}

const iso = unixSeconds => new Date(unixSeconds * 1000).toISOString();

/** Hours and minutes in UTC of a unix time in seconds. */
export const clock = unixSeconds => (present(unixSeconds) ? iso(unixSeconds).slice(11, 16) : MISSING);

/** Hours, minutes and seconds in UTC of a unix time in seconds. */
export const clockSeconds = unixSeconds => (present(unixSeconds) ? iso(unixSeconds).slice(11, 19) : MISSING);

/** Date and time in UTC of a unix time in seconds. */
export const fullTime = unixSeconds =>
  present(unixSeconds) ? `${iso(unixSeconds).replace('T', ' ').slice(0, 19)} UTC` : MISSING;

// C0 and C1 controls other than tab and newline: an escape sequence must not reach a terminal by way of the clipboard.
// Marks that turn the direction of writing can make a text look like another one.
const CONTROLS = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;

/** Text from outside, with control characters made visible (ESC becomes its picture, U+241B). */
export function visible(text) {
  return String(text ?? '').replace(CONTROLS, c => {
    const code = c.charCodeAt(0);
    return code < 0x20 ? String.fromCharCode(0x2400 + code) : code === 0x7f ? '\u2421' : '\ufffd';
  });
}

/** What an ApiError says, for a reader: its message, and the id under which the server's log knows the request. */
export const sayError = error => visible(error.message) + (error.requestId ? ` (request ${error.requestId})` : '');
