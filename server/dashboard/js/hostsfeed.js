// The worker hosts, asked for every ten seconds while the page can be seen: there is no stream of them. The jobs that run
// there are told by id; each one's name is read once.
import { getJson, jobPath } from './api.js';
import { setContact } from './contact.js';
import { Store } from './store.js';

const EVERY_MS = 10_000;

export class HostsFeed {
  /** `{hosts, names, error}`: hosts as the API has them, null until the first answer; names of jobs by id. */
  state = new Store({ hosts: null, names: new Map(), error: null });
  #names = new Map();
  #timer = null;
  #reading = false;
  #stopped = false;
  #onVisible = () => this.#look();

  start() {
    setContact({ state: 'connecting', error: null, nextTryAt: null, lastAt: Date.now(), retry: () => this.retry() });
    document.addEventListener('visibilitychange', this.#onVisible);
    this.#look();
  }

  stop() {
    this.#stopped = true;
    clearTimeout(this.#timer);
    document.removeEventListener('visibilitychange', this.#onVisible);
  }

  retry() {
    setContact({ nextTryAt: null });
    this.#read();
  }

  #look() {
    clearTimeout(this.#timer);
    if (document.visibilityState === 'visible' && !this.#stopped) this.#read();
  }

  async #read() {
    if (this.#reading) return;
    this.#reading = true;
    clearTimeout(this.#timer);
    try {
      const { data: hosts } = await getJson('/v1/hosts');
      await this.#readNames(hosts.flatMap(host => host.running_jobs));
      if (!this.#stopped) this.#publish(hosts);
    } catch (error) {
      if (!this.#stopped) this.#fail(error);
    } finally {
      this.#reading = false;
      if (!this.#stopped) this.#timer = setTimeout(() => this.#look(), EVERY_MS);
    }
  }

  /** A name that cannot be read now is asked for again with the next answer; until then the id stands for it. */
  async #readNames(ids) {
    const unknown = ids.filter(id => !this.#names.has(id));
    const jobs = await Promise.allSettled(unknown.map(id => getJson(jobPath(id))));
    for (const { value: job } of jobs) if (job) this.#names.set(job.id, job.user_provided_suffix || job.id);
  }

  #publish(hosts) {
    setContact({ state: 'live', lastAt: Date.now(), nextTryAt: null, error: null });
    this.state.set({ hosts, names: new Map(this.#names), error: null });
  }

  #fail(error) {
    const has = this.state.get().hosts !== null;
    setContact({ state: has ? 'stale' : 'none', error, nextTryAt: Date.now() + EVERY_MS });
    this.state.set({ ...this.state.get(), error });
  }
}
