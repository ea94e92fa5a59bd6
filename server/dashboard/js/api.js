// Requests to the service under the session's cookie. Every failure becomes an ApiError whose text is for the reader.

// A read that takes longer than this is of no use to a page that shows live figures.
const TIMEOUT_MS = 15_000;

export class ApiError extends Error {
  constructor(message, { status = 0, code = null, requestId = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.requestId = requestId;
  }
}

export const jobPath = id => `/v1/fine_tuning/jobs/${encodeURIComponent(id)}`;

export const getJson = path => call('GET', path);

export const postJson = path => call('POST', path);

async function call(method, path) {
  let response;
  try {
    response = await fetch(path, {
      method,
      headers: { accept: 'application/json' },
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
  } catch (error) {
    const slow = error.name === 'TimeoutError';
    throw new ApiError(slow ? `the server did not answer in ${TIMEOUT_MS / 1000} s` : 'the server cannot be reached');
  }
  const body = await response.json().catch(() => null);
  if (response.ok && body !== null) return body;
  if (response.status === 401) signIn();
  const detail = body?.error ?? {};
  throw new ApiError(detail.message ?? `the server answered ${response.status}`, {
    status: response.status,
    code: detail.code,
    requestId: response.headers.get('x-request-id'),
  });
}

/** The session is over: ask for the key again, and come back to this address. */
function signIn() {
  location.assign('/login' + location.hash);
}
