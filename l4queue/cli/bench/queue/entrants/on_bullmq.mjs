// BullMQ: a worker with 64 jobs at once; addBulk, results from the events of the queue (QueueEvents).
// Run as `node on_bullmq.mjs client|worker` with BENCH_REDIS_URL and BENCH_MODULES, the folder of its packages.

import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const require = createRequire(`${process.env.BENCH_MODULES}/`);
const { Queue, QueueEvents, Worker } = require("bullmq");

const NAME = "bench";
const RESULT = "ok";
const CONCURRENCY = 64; // jobs at once, as in pacing.py
const BULK = 1000; // jobs of one addBulk, which is one transaction
const MAX_EVENTS = 1_000_000; // kept in the stream of events; 10,000 by default, which a rush would overrun
const WORDS = "the quick brown fox jumps over the lazy dog and runs away from all of them ";

const url = new URL(process.env.BENCH_REDIS_URL);
const connection = { host: url.hostname, port: Number(url.port), password: decodeURIComponent(url.password) };

function promptsOf(order) {
  const filler = WORDS.repeat(Math.floor(order.bytes / WORDS.length) + 1).slice(0, order.bytes);
  return Array.from({ length: order.count }, (_, number) => `${order.salt} ${number} ${filler}`.slice(0, order.bytes));
}

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, Math.max(0, ms)));

class Sender {
  async open() {
    this.queue = new Queue(NAME, { connection, streams: { events: { maxLen: MAX_EVENTS } } });
    this.events = new QueueEvents(NAME, { connection });
    this.waiting = new Map(); // job id -> function that is told of its result
    this.early = new Map(); // results of jobs whose ids are not known here yet
    this.events.on("completed", ({ jobId, returnvalue }) => {
      const tell = this.waiting.get(jobId);
      if (tell === undefined) this.early.set(jobId, returnvalue);
      else tell(returnvalue);
    });
    await Promise.all([this.queue.waitUntilReady(), this.events.waitUntilReady()]);
  }

  async close() {
    await Promise.all([this.queue.close(), this.events.close()]);
  }

  result(jobId) {
    if (this.early.has(jobId)) {
      const value = this.early.get(jobId);
      this.early.delete(jobId);
      return Promise.resolve(value);
    }
    return new Promise((resolve) => {
      this.waiting.set(jobId, (value) => {
        this.waiting.delete(jobId);
        resolve(value);
      });
    });
  }

  // The making of prompts is neither in the time of a rush nor in its CPU time.
  async prepare(order) {
    this.prepared = promptsOf(order);
    return {};
  }

  async rush(order) {
    const prompts = this.prepared ?? promptsOf(order);
    this.prepared = undefined;
    const began = performance.now();
    const results = [];
    for (let begin = 0; begin < prompts.length; begin += BULK) {
      const jobs = prompts.slice(begin, begin + BULK).map((prompt) => ({ name: "noop", data: { prompt } }));
      for (const job of await this.queue.addBulk(jobs)) results.push(this.result(job.id));
    }
    const sent = performance.now();
    for (const value of await Promise.all(results)) if (value !== RESULT) throw new Error(`result ${value}`);
    return { enqueue_s: (sent - began) / 1000, wall_s: (performance.now() - began) / 1000 };
  }

  async one(prompt) {
    const job = await this.queue.add("noop", { prompt });
    const value = await this.result(job.id);
    if (value !== RESULT) throw new Error(`result ${value}`);
    return performance.now();
  }

  async alone(order) {
    const found = [];
    const end = performance.now() + order.most_s * 1000;
    for (const prompt of promptsOf(order)) {
      if (performance.now() > end && found.length) break;
      await sleep(order.pause_s * 1000);
      const began = performance.now();
      found.push((await this.one(prompt)) - began);
    }
    return { result_ms: found };
  }

  async paced(order) {
    const found = [];
    const late = [];
    let due = performance.now() + 50;
    const send = async (prompt, due) => {
      late.push(performance.now() - due);
      found.push((await this.one(prompt)) - due);
    };
    const sending = [];
    for (const prompt of promptsOf(order)) {
      due += (-Math.log(1 - Math.random()) / order.rate_per_s) * 1000;
      if (due > performance.now()) await sleep(due - performance.now());
      sending.push(send(prompt, due));
    }
    await Promise.all(sending);
    return { result_ms: found, late_ms: late };
  }
}

async function serve() {
  const sender = new Sender();
  await sender.open();
  const versions = { node: process.version };
  for (const name of ["bullmq", "ioredis"]) versions[name] = require(`${name}/package.json`).version;
  console.log(JSON.stringify({ versions, can_pace: true }));
  for await (const line of createInterface({ input: process.stdin })) {
    const order = JSON.parse(line);
    console.log(JSON.stringify(await sender[order.do](order)));
  }
  await sender.close();
}

if (process.argv[2] === "client") {
  await serve();
} else {
  const worker = new Worker(NAME, async () => RESULT, { connection, concurrency: CONCURRENCY });
  await worker.waitUntilReady();
  process.once("SIGTERM", () => worker.close().then(() => process.exit(0)));
}
