// The jobs of the list: the stream's first frame brings a page of them, later frames each changed job. Published at most
// once a second, so that many busy jobs cost one render.
import { getJson } from './api.js';
import { setContact } from './contact.js';
import { jobView } from './jobview.js';
import { Stream } from './sse.js';
import { Store } from './store.js';

const PAGE_SIZE = 100; // the most that the API gives at once
const PUBLISH_MS = 1_000;
const LIST = `/v1/fine_tuning/jobs?limit=${PAGE_SIZE}&include[]=loss_curve`;

export class JobsFeed {
  /** `{jobs, hasMore, error}`; jobs is null until the first answer. Newest first. */
  state = new Store({ jobs: null, hasMore: false, error: null });
  #jobs = new Map(); // newest first, in the server's order
  #hasMore = false;
  #publishing = null;
  #stream = null;

  start() {
    this.#stream = new Stream({
      url: () => `${LIST}&stream=true`,
      handlers: { jobs: page => this.#onPage(page), job: job => this.#onJob(job) },
      onState: state => setContact({ ...state, retry: () => this.#stream?.tryNow() }),
      onFailure: () => this.#findOut(),
    });
    setContact({ error: null });
  }

  stop() {
    this.#stream?.close();
    clearTimeout(this.#publishing);
  }

  /** Add the page after the oldest job that is known. */
  async more() {
    const oldest = [...this.#jobs.values()].pop();
    try {
      const page = await getJson(`${LIST}&after=${encodeURIComponent(oldest.id)}`);
      for (const job of page.data) this.#jobs.set(job.id, jobView(job));
      this.#hasMore = page.has_more;
      this.#publish({ error: null });
    } catch (error) {
      this.#publish({ error });
    }
  }

  #onPage(page) {
    const known = this.#jobs.size;
    const before = this.#jobs;
    this.#jobs = new Map(page.data.map(job => [job.id, jobView(job)]));
    for (const [id, view] of before) if (!this.#jobs.has(id)) this.#jobs.set(id, view);
    // A reconnection's first page says nothing about the older jobs that were read after it.
    if (known <= PAGE_SIZE) this.#hasMore = page.has_more;
    setContact({ error: null });
    this.#publish({ error: null });
  }

  #onJob(job) {
    // A frame without a curve (nothing new to draw) must not wipe the one that is drawn.
    const view = jobView(job);
    const before = this.#jobs.get(job.id);
    if (before) this.#jobs.set(job.id, view.curve.length ? view : { ...view, curve: before.curve });
    else this.#jobs = new Map([[job.id, view], ...this.#jobs]);
    this.#publishing ??= setTimeout(() => this.#publish({}), PUBLISH_MS);
  }

  #publish(change) {
    clearTimeout(this.#publishing);
    this.#publishing = null;
    this.state.set({ ...this.state.get(), ...change, jobs: [...this.#jobs.values()], hasMore: this.#hasMore });
  }

  /** After a lost connection: ask once in the plain way, since a stream cannot say why it was refused. */
  async #findOut() {
    try {
      await getJson('/v1/fine_tuning/jobs?limit=1');
    } catch (error) {
      setContact({ error });
      if (this.state.get().jobs === null) this.state.set({ ...this.state.get(), error });
    }
  }

  retry() {
    this.#stream?.tryNow();
  }
}
