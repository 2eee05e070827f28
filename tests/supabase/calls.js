// Makes the calls of the task, one after the other, and prints what each resolves to.
"use strict";

const { client, task } = require("./client.js");

async function main() {
  const supabase = client();
  const answers = [];
  for (const chain of task.calls) {
    let call = supabase;
    for (const [method, ...args] of chain) call = call[method](...args);
    const { data, error, status, count } = await call;
    answers.push({ data, error, status, count });
  }
  process.stdout.write(JSON.stringify(answers));
}

main();
