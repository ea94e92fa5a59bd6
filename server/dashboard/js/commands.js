// The same job as curl, Python and `lomo` commands: the page is never the only way.

const quote = text => `'${String(text).replaceAll("'", "'\\''")}'`;

// The `lomo` object of a job also carries state; these keys are the ones a request may name (jobs/spec.py, LomoOptions).
const OPTIONS = [
  'optimizer',
  'learning_rate',
  'schedule',
  'warmup_ratio',
  'weight_decay',
  'clip',
  'precision',
  'rounding',
  'param_groups',
  'frozen',
  'activation_checkpointing',
  'max_seq_length',
  'packing',
  'train_on',
  'devices',
  'nodes',
  'offload',
  'checkpoint_every_steps',
  'keep_checkpoints',
  'eval_every_steps',
  'early_stopping_patience',
  'keep_best',
  'final_model',
  'sample_prompts',
  'sample_max_new_tokens',
  'max_steps',
  'priority',
];

const isGiven = value => value != null && !(Array.isArray(value) && value.length === 0);

/** The options of a job that a create request takes, in the order of the specification; nulls and empty lists left out. */
export function optionsOf(job) {
  return Object.fromEntries(OPTIONS.filter(key => isGiven(job.lomo?.[key])).map(key => [key, job.lomo[key]]));
}

/** The body that would create this job again. */
export function createBody(job) {
  return {
    model: job.model,
    training_file: job.training_file,
    ...(job.validation_file ? { validation_file: job.validation_file } : {}),
    ...(job.user_provided_suffix ? { suffix: job.user_provided_suffix } : {}),
    seed: job.seed,
    method: { type: 'supervised', supervised: { hyperparameters: job.hyperparameters } },
    ...(Object.keys(job.metadata ?? {}).length ? { metadata: job.metadata } : {}),
    lomo: optionsOf(job),
  };
}

function curl(body) {
  const members = Object.entries(body).map(([key, value]) => `${JSON.stringify(key)}: ${JSON.stringify(value)}`);
  return [
    `curl ${location.origin}/v1/fine_tuning/jobs \\`,
    '  -H "Authorization: Bearer $LOMO_API_KEY" \\',
    '  -H "Content-Type: application/json" \\',
    `  -d ${quote(`{${members.join(',\n       ')}}`)}`,
  ].join('\n');
}

function pythonValue(value, indent) {
  const pad = ' '.repeat(indent);
  if (value === null) return 'None';
  if (typeof value === 'boolean') return value ? 'True' : 'False';
  if (typeof value !== 'object') return JSON.stringify(value);
  if (Array.isArray(value)) {
    const items = value.map(item => `${pad}    ${pythonValue(item, indent + 4)},`);
    return items.length ? `[\n${items.join('\n')}\n${pad}]` : '[]';
  }
  const lines = Object.entries(value).map(
    ([key, item]) => `${pad}    ${JSON.stringify(key)}: ${pythonValue(item, indent + 4)},`,
  );
  return `{\n${lines.join('\n')}\n${pad}}`;
}

function python({ lomo, ...body }) {
  const lines = Object.entries(body).map(([key, value]) => `    ${key}=${pythonValue(value, 4)},`);
  if (lomo && Object.keys(lomo).length) lines.push(`    extra_body={"lomo": ${pythonValue(lomo, 4)}},`);
  return [
    'import os',
    'from openai import OpenAI',
    '',
    `client = OpenAI(base_url="${location.origin}/v1", api_key=os.environ["LOMO_API_KEY"])`,
    'client.fine_tuning.jobs.create(',
    ...lines,
    ')',
  ].join('\n');
}

/**
 * An option of the `lomo` object as a flag: `--no-packing`, `--clip-mode norm --clip-threshold 1`, `--schedule linear`; a
 * list of texts as one flag each, a list of objects as JSON.
 */
function flag([key, value]) {
  const name = `--${key.replaceAll('_', '-')}`;
  if (typeof value === 'boolean') return [value ? name : name.replace('--', '--no-')];
  if (Array.isArray(value)) {
    const isText = value.every(item => typeof item === 'string');
    return isText ? value.flatMap(item => flag([key, item])) : [`--lomo ${quote(`${key}=${JSON.stringify(value)}`)}`];
  }
  if (value !== null && typeof value === 'object') {
    return Object.entries(value).flatMap(([part, item]) => flag([`${key}_${part}`, item]));
  }
  return value == null ? [] : [`${name} ${plain(value)}`];
}

function cli({ method, metadata, ...body }) {
  const { lomo, ...named } = body;
  const hyperparameters = method?.supervised?.hyperparameters ?? {};
  const options = Object.entries({ ...named, ...hyperparameters, ...lomo }).flatMap(flag);
  const pairs = Object.entries(metadata ?? {}).map(([key, value]) => `--metadata ${plain(`${key}=${value}`)}`);
  return ['lomo jobs create', ...[...options, ...pairs].map(option => `  ${option}`)].join(' \\\n');
}

/** Quote for a shell only what needs it. */
const plain = value => (/^[\w./:=@-]+$/.test(value) ? String(value) : quote(value));

/** `[[key, title, text], ...]` for a create body. */
export const createForms = body => [
  ['curl', 'curl', curl(body)],
  ['cli', 'lomo', cli(body)],
  ['python', 'Python', python(body)],
];

/** How to make a first job; `file-…` stands for the id that the upload answers. */
export function firstJobForms() {
  const body = { model: 'smollm2-135m-instruct', training_file: 'file-…', suffix: 'my-first-job' };
  return [
    [
      'cli',
      'lomo',
      'lomo jobs create --model smollm2-135m-instruct \\\n  --training-file train.jsonl --suffix my-first-job --follow',
    ],
    [
      'curl',
      'curl',
      [
        `curl ${location.origin}/v1/files -H "Authorization: Bearer $LOMO_API_KEY" \\`,
        '  -F purpose=fine-tune -F file=@train.jsonl',
        '# then, with the id that it answers:',
        curl(body),
      ].join('\n'),
    ],
    ['python', 'Python', python(body)],
  ];
}
