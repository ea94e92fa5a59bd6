// The dashboard: frame, route, page. Preact and htm without a build step; everything it knows it asks of /v1.
import { html, render } from '../vendor/htm-preact-3.1.1.module.js';
import { Shell } from './components/shell.js';
import { HostsPage } from './pages/hosts.js';
import { JobPage } from './pages/job.js';
import { JobsPage } from './pages/jobs.js';
import { route } from './router.js';

const Unknown = () =>
  html`<div class="card"><div class="empty"><h1>No such page</h1><a class="btn" href="#/jobs">All jobs</a></div></div>`;

function App() {
  const { page, id, tab } = route.use();
  let view;
  if (page === 'jobs') view = html`<${JobsPage} key="jobs" />`;
  else if (page === 'job' && id) view = html`<${JobPage} key=${id} id=${id} tab=${tab ?? 'events'} />`;
  else if (page === 'hosts') view = html`<${HostsPage} key="hosts" />`;
  else view = html`<${Unknown} />`;
  return html`<${Shell} page=${page}>${view}<//>`;
}

render(html`<${App} />`, document.getElementById('app'));
