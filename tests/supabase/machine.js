// How the app's machine writes signals: in batches of up to 100; on any error the batch goes back to the
// front of the queue and is sent again. Prints a line for each answer. The number of tries is bounded.
"use strict";

const { setTimeout: pause } = require("node:timers/promises");
const { client, task } = require("./client.js");

const BATCH = 100;

async function main() {
  const supabase = client();
  const queue = task.signals;
  for (let tries = 0; queue.length > 0 && tries < task.maxTries; tries += 1) {
    const batch = queue.splice(0, BATCH);
    const { error, status } = await supabase.from("signals").insert(batch);
    if (error) queue.unshift(...batch);
    console.log(JSON.stringify({ status, code: error?.code ?? null, rows: batch.length }));
    if (error) await pause(task.delay);
  }
  process.exitCode = queue.length > 0 ? 1 : 0;
}

main();
